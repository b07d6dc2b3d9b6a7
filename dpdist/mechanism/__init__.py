"""The trusted base: everything the privacy guarantee rests on, and nothing else.

Reading order: `keys`, `sampling`, `clipping`, `noise`, `step`, `accounting`, `ledger`, `composition`, `incarnation`.
Nothing here imports another room of the project; all but the ledger's one file is pure.
"""
