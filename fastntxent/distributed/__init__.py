"""A batch that is spread over the ranks of a process group: every row against the rows of all ranks.

Each rank holds some rows. Unit rows travel, by all-gather or round a ring; each similarity is formed once, on one rank,
for both its rows, and the parts of the log-sum-exps nu go to the ranks whose rows they are of. Later a rank forms, from
two numbers a row of the others (nu_j, and w_j = d loss / d nu_j), the exact gradient of its own rows:

    G_ij = w_i P_ij + w_j P_ji,   P_ij = exp(k s_ij - nu_i)        d/du_i = k sum_j G_ij u_j

So no gradient of a row travels. docs/distributed.md has the contract and what it costs.
"""

from .agreement import Alike
from .batch import ShardedBatch
from .shard import Group, Sharding

__all__ = ["Alike", "Group", "ShardedBatch", "Sharding"]
