"""A batch that is spread over the ranks of a process group: every row is compared with the rows of all ranks.

Each rank holds some of the rows. Ranks send each other unit rows, by all-gather or around a ring. In the forward of the
primitive, `neg_lse`, only one rank computes each similarity, for both of its rows. That rank sends the partial
log-sum-exps to the ranks that hold the rows. In the backward, a rank needs only two more numbers for each row of the
other ranks, nu_j and w_j = d loss / d nu_j. With these it computes the exact gradient of its own rows:

    G_ij = w_i P_ij + w_j P_ji,   P_ij = exp(k s_ij - nu_i)        d/du_i = k sum_j G_ij u_j

So ranks send no gradients of rows. docs/distributed.md has the contract and the costs.
"""

from .agreement import Alike
from .batch import ShardedBatch
from .shard import Group, Sharding

__all__ = ["Alike", "Group", "ShardedBatch", "Sharding"]
