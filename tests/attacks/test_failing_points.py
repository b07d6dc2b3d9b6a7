"""What a point of a sweep fails with may quote a record: it is in a file for its owner alone."""

from __future__ import annotations

from jobs import Jobs


def test_what_a_point_fails_with_is_quoted_in_a_file_for_its_owner_alone(jobs: Jobs) -> None:
    to = jobs.new("sweep").root
    config = (str(jobs.config), "data.source=userland:failing", "data.options.index=500")
    options = ("--cluster", "local", "--nodes", "1", "--arms", "sgd", "--steps", "3", "--to", str(to))
    ended = jobs.command("scaling", *config, "sampling.expected_batch_size=900", *options).wait()
    assert ended.code == 1, ended.err
    log = to / "jobs/sgd-n1-r1.rank-0.log"
    assert f"dpdist: failed with RuntimeError; what it says is in {log}" in ended.err
    assert "Alice Example" not in ended.err + ended.out
    assert [path for path in to.rglob("*") if path.is_file() and b"Alice" in path.read_bytes()] == [log]
    assert log.parent.stat().st_mode & 0o077 == 0
    modes = {path.name: path.stat().st_mode & 0o077 for path in log.parent.glob("*.log")}
    assert modes == {log.name: 0, "sgd-n1-r1.log": 0}
