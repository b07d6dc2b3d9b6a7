"""One page that a run, a sweep or a comparison of runs can be judged by, from files alone."""
