"""The negatives shared by all queries of a step: rows of the whole stored bank, or a queue of the most recent keys.

The teacher does not change, so a queue of its keys is only a random subset of the bank; and since the rows of a bank are known, those from
which an anchor should not be pushed away can be excluded. Shape letters: B anchors, P key width, J negatives, M rows that are not
negatives.
"""

import numpy as np
import torch
from torch import Tensor, nn

from bingo import seeds
from bingo.images.uploads import upload_together
from bingo.methods.contract import Batch, Context
from bingo.methods.parts.momentum import Queue
from bingo.runtime.errors import UserError


class Negatives(nn.Module):
    """`rows` negatives of the kind `bank` or `queue`. With a bank, an anchor and its drawn member are never among its own negatives;
    `mask_bag` excludes the anchor's whole bag, also with a queue. Raises UserError for a bank without stored views."""

    def __init__(self, kind: str, rows: int, key_width: int, mask_bag: bool, context: Context):
        super().__init__()
        self.kind, self.rows, self.mask_bag, self.context = kind, rows, mask_bag, context
        self.drawn_JP: Tensor | None = None
        self.cluster_T, self.members_TK = self._bag_tables() if mask_bag and context.bags is not None else (None, None)
        if kind == "bank" and context.keys_TVP is not None and not context.keys_TVP.shape[1]:
            way_out = "set extract.views to 1 or more, or the method's negatives to queue"
            raise UserError(f"extract.views = 0: negatives = bank takes them from stored keys; {way_out}")
        if kind == "queue":
            self.queue = Queue(rows, key_width, context.seed)
            self._prefill()

    def _bag_tables(self) -> tuple[Tensor | None, Tensor | None]:
        """The bags on the device: the group of each row (T,), or the members of each row (T, K): int64 or, on a CPU, the index's int32."""
        bags = self.context.bags
        assert bags is not None
        if bags.cluster_T is not None:
            return torch.from_numpy(bags.cluster_T).to(self.context.device), None
        members_TK, device = torch.from_numpy(bags.members_TK), self.context.device
        return None, members_TK if device.type == "cpu" else members_TK.to(device, torch.int64)

    def _prefill(self) -> None:
        """Initialise the queue with stored keys if they exist, so that the first steps train against real negatives."""
        keys_TVP = self.context.keys_TVP
        if self.context.keys == "momentum" or keys_TVP is None or not keys_TVP.shape[1]:
            return
        count = min(len(self.queue.rows_Q), len(keys_TVP))
        rows = torch.from_numpy(seeds.permutation(self.context.seed, "prefill", 0, len(keys_TVP))[:count])
        self.queue.keys_QP[:count] = keys_TVP[rows.to(keys_TVP.device), 0].float().to(self.queue.keys_QP)
        self.queue.rows_Q[:count] = rows

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, Tensor | None]:
        """Unit rows (J, P), in float16 for a bank, and which of them are hidden from each anchor, bool (B, J) or (1, J)."""
        if self.kind == "bank":
            bank_JP, rows_J = self._bank_draw(step)
            return bank_JP, self._hidden(batch, rows_J)
        bank_JP, rows_J = self.queue.keys_QP.clone(), self.queue.rows_Q.clone()  # a push may come before backward has used these
        return bank_JP, self.queue.empty() | self._hidden(batch, rows_J) if self.mask_bag else self.queue.empty()

    def push(self, keys_BP: Tensor, rows_B: Tensor) -> None:
        """Push the keys of a step into a queue; a bank already has all keys."""
        if self.kind == "queue":
            self.queue.push(keys_BP, rows_B)

    def _bank_draw(self, step: int) -> tuple[Tensor, Tensor]:
        """Distinct rows of the bank with one stored view each, in the bank's precision, the same on every process: `rows` of them, or all.

        They are stored in a buffer that the next draw overwrites: allocating memory of that size would cost as much as filling it. They
        are in the order of rows, which makes reading the bank twice as fast.
        """
        bank_TVP = self.context.keys_TVP
        assert bank_TVP is not None
        rows, views, width = bank_TVP.shape
        chosen = seeds.distinct(self.context.seed, "negatives", step, rows, self.rows)
        view_J = (seeds.uniforms(self.context.seed, "negative view", step, chosen)[:, 0] * views).astype(np.int64)
        places_J, rows_J = upload_together([chosen * views + view_J, chosen], bank_TVP.device)
        if self.drawn_JP is None or self.drawn_JP.device != bank_TVP.device:
            self.drawn_JP = bank_TVP.new_empty(len(chosen), width)
        torch.index_select(bank_TVP.flatten(0, 1), 0, places_J, out=self.drawn_JP)
        return self.drawn_JP, rows_J

    def _hidden(self, batch: Batch, rows_J: Tensor) -> Tensor:
        """(B, J): anchor, member and with `mask_bag` the anchor's bag. Bags that are clusters are compared by group, not by member."""
        own = [batch.anchor_rows_B] if batch.member_rows_B is None else [batch.anchor_rows_B, batch.member_rows_B]
        members = [] if self.members_TK is None else [self.members_TK[batch.anchor_rows_B]]
        excluded_BM = torch.cat([rows_B[:, None] for rows_B in own] + members, dim=1)
        hidden_BJ = hidden_places(rows_J, excluded_BM) if self.kind == "bank" else hidden_negatives(rows_J, excluded_BM)
        if self.cluster_T is not None:
            same_BJ = self.cluster_T[rows_J.clamp(min=0)][None] == self.cluster_T[batch.anchor_rows_B][:, None]
            hidden_BJ |= same_BJ & (rows_J >= 0)
        return hidden_BJ


def hidden_negatives(bank_rows_J: Tensor, excluded_BM: Tensor) -> Tensor:
    """(B, J) bool: whether row j of the bank shows one of the M rows that are not negatives of anchor b (-1 excludes nothing)."""
    hidden_BJ = torch.zeros(len(excluded_BM), len(bank_rows_J), dtype=torch.bool, device=bank_rows_J.device)
    for rows_B in excluded_BM.unbind(dim=1):
        hidden_BJ |= (bank_rows_J[None, :] == rows_B[:, None]) & (rows_B >= 0)[:, None]
    return hidden_BJ


def hidden_places(bank_rows_J: Tensor, excluded_BM: Tensor) -> Tensor:
    """`hidden_negatives` for a bank with rows in ascending order: each of the M rows is looked up instead of compared with all J."""
    nowhere, place_BM = len(bank_rows_J), torch.searchsorted(bank_rows_J, excluded_BM)
    absent_BM = bank_rows_J[place_BM.clamp(max=nowhere - 1)] != excluded_BM
    hidden_BJ = torch.zeros(len(excluded_BM), nowhere + 1, dtype=torch.bool, device=bank_rows_J.device)
    return hidden_BJ.scatter_(1, place_BM.masked_fill_(absent_BM, nowhere), True)[:, :nowhere]
