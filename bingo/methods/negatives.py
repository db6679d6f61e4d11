"""The common negatives of a step's queries: rows of the whole stored bank, or a queue of the last keys.

The teacher does not move, so a queue of its keys is only a random subset of the bank; and rows of a bank are known, so those that an
anchor should not be pushed from can be left out. Shape letters: B anchors, P key width, J negatives, M rows that are no negatives.
"""

import numpy as np
import torch
from torch import Tensor, nn

from bingo import seeds
from bingo.methods.contract import Batch, Context
from bingo.methods.parts import Queue, hidden_negatives


class Negatives(nn.Module):
    """`rows` negatives of the kind `bank` or `queue`. Of a bank, an anchor and its drawn member are never among its own negatives;
    `mask_bag` leaves out the anchor's whole bag, of a queue too."""

    def __init__(self, kind: str, rows: int, key_width: int, mask_bag: bool, context: Context):
        super().__init__()
        self.kind, self.rows, self.mask_bag, self.context = kind, rows, mask_bag, context
        if kind == "queue":
            self.queue = Queue(rows, key_width, context.seed)
            self._prefill()

    def _prefill(self) -> None:
        """Start the queue from stored keys where they exist: the first steps then train against real negatives."""
        keys_TVP = self.context.keys_TVP
        if self.context.keys == "momentum" or keys_TVP is None:
            return
        count = min(len(self.queue.rows_Q), len(keys_TVP))
        rows = torch.from_numpy(seeds.permutation(self.context.seed, "prefill", 0, len(keys_TVP))[:count])
        self.queue.keys_QP[:count] = keys_TVP[rows.to(keys_TVP.device), 0].float().to(self.queue.keys_QP)
        self.queue.rows_Q[:count] = rows

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, Tensor | None]:
        """Unit rows (J, P) and which of them each anchor does not see, bool (B, J) or (1, J)."""
        if self.kind == "bank":
            bank_JP, rows_J = self._bank_draw(step)
            return bank_JP, self._hidden(batch, rows_J) if self.mask_bag else hidden_negatives(rows_J, _own_rows(batch))
        bank_JP, rows_J = self.queue.keys_QP.clone(), self.queue.rows_Q.clone()  # a push may come before backward is done with these
        return bank_JP, self.queue.empty() | self._hidden(batch, rows_J) if self.mask_bag else self.queue.empty()

    def push(self, keys_BP: Tensor, rows_B: Tensor) -> None:
        """Give a queue the keys of a step; a bank has them all."""
        if self.kind == "queue":
            self.queue.push(keys_BP, rows_B)

    def _bank_draw(self, step: int) -> tuple[Tensor, Tensor]:
        """Distinct rows of the bank with one stored view each, the same on every process: `rows` of them, or all."""
        bank_TVP = self.context.keys_TVP
        assert bank_TVP is not None
        rows, views = len(bank_TVP), bank_TVP.shape[1]
        count = min(rows, self.rows)
        chosen = np.arange(rows) if count == rows else seeds.permutation(self.context.seed, "negatives", step, rows)[:count]
        drawn = (seeds.uniforms(self.context.seed, "negative view", step, chosen)[:, 0] * views).astype(np.int64)
        rows_J, view_J = (torch.from_numpy(x).to(bank_TVP.device) for x in (chosen, drawn))
        return bank_TVP[rows_J, view_J], rows_J

    def _hidden(self, batch: Batch, rows_J: Tensor) -> Tensor:
        """(B, J): anchor, member and the anchor's bag. A bag of the kind `cluster` is compared by group, not member by member."""
        bags, own_BM = self.context.bags, _own_rows(batch)
        if bags is None:
            return hidden_negatives(rows_J, own_BM)
        if bags.cluster_T is not None:
            cluster_T = torch.from_numpy(bags.cluster_T).to(rows_J.device)
            same_BJ = (cluster_T[rows_J.clamp(min=0)][None] == cluster_T[batch.anchor_rows_B][:, None]) & (rows_J >= 0)
            return same_BJ | hidden_negatives(rows_J, own_BM)
        members_BK = torch.from_numpy(bags.members_TK[batch.anchor_rows_B.cpu().numpy()].astype(np.int64)).to(rows_J.device)
        return hidden_negatives(rows_J, torch.cat([own_BM, members_BK], dim=1))


def _own_rows(batch: Batch) -> Tensor:
    own = [batch.anchor_rows_B] if batch.member_rows_B is None else [batch.anchor_rows_B, batch.member_rows_B]
    return torch.stack(own, dim=1)
