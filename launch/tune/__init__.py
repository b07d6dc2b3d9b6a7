"""`dpdist tune`: a private search for hyper-parameters, which states what the whole search costs."""
