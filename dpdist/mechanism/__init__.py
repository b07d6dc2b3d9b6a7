"""The trusted base: everything that the privacy guarantee rests on, and nothing else.

Reading order: `keys`, `sampling`, `clipping`, `noise`, `step`, `accounting`, `ledger`, `composition`, `incarnation`.
Nothing here imports another room of the project, and only `ledger` reads and writes a file.
"""
