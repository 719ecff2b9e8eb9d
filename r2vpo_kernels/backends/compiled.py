"""What backends of compiled code share: a launch takes one tuple of tensors and numbers.

csrc/bind.h fills the structs of csrc/kernels.h from it, in their order.
"""

from __future__ import annotations

import importlib
import json
import operator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .calls import Column, Prepare, Tokens


def build_report(name: str) -> str:
    """What setup.py says of an extension."""
    path = Path(__file__).with_name("build_report.json")
    return json.loads(path.read_text()).get(name, "not built") if path.exists() else "not built"


def load(name: str) -> Any:
    """The module of an extension, or an ImportError that says why there is none."""
    try:
        return importlib.import_module(f"._{name}", __package__)
    except ImportError as error:
        raise ImportError(f"{build_report(name)}; {error}") from error


# In the order of the structs Tokens and Prepare in csrc/kernels.h; of Prepare, `numbers` and the
# sampling mask come last.
_tokens = operator.attrgetter(
    "workspace", "tokens", "units", "groups", "parts", "on_policy", "sequence_level",
    "policy_loss", "kl", "kl_unbiased", "with_support",
)  # fmt: skip
_prepare = operator.attrgetter(
    "advantages", "labels", "mask", "old_logps", "importance_weights", "variance_coef",
    "temperature", "ref_logps", "logps", "entropy", "cu_seqlens", "group_ids", "center",
    "normalizer", "unit_length", "units_per_group", "ignore_index", "vocabulary", "first_word",
    "words", "mean_over_unit", "count_kind", "logps_out", "entropy_out", "activity",
    "sparse_head", "numbers",
)  # fmt: skip


class Launchers:
    """The launchers of a module; they take what those of every backend take."""

    # What a backend says of itself.

    def _launch(self, name: str, x: Tensor, *arguments: object) -> None:
        """Call the kernel of this name where x lies."""
        raise NotImplementedError

    def scratch(self, t: Tokens) -> Tensor | None:
        """Memory for the partial sums of `means` and `finish`, if they need any from here."""
        return None

    # Rows. Row r belongs to token index[r], or to first + r without an index.

    def logps_forward(
        self, logits: Tensor, t: Tokens, index: Tensor | None, first: int, logps: Tensor,
        top: Tensor, log_total: Tensor, entropy: Tensor | None,
    ) -> None:  # fmt: skip
        """Write Eq. 1 into logps, Eq. 3 into entropy, and for logps_backward top and log_total."""
        self._launch(
            "logps_forward", logits, logits, None, *_tokens(t), t.support, index, first, logps, top,
            log_total, entropy,
        )  # fmt: skip

    def logps_backward(
        self, logits: Tensor, dlogits: Tensor, t: Tokens, index: Tensor | None, first: int,
        logps: Tensor, top: Tensor, log_total: Tensor, entropy: Tensor | None, grad_logps: Tensor,
        grad_entropy: Tensor | None, upstream: Tensor | None,
    ) -> None:  # fmt: skip
        """Write into dlogits the gradient of logps and, with entropy, that of entropy (Eq. 8)."""
        self._launch(
            "logps_backward", logits, logits, dlogits, *_tokens(t), t.support, index, first, logps,
            top, log_total, entropy, grad_logps, grad_entropy, upstream,
        )  # fmt: skip

    def one_pass(
        self, logits: Tensor, dlogits: Tensor, t: Tokens, index: Tensor | None, first: int,
        logps: Tensor, entropy: Tensor | None,
    ) -> None:  # fmt: skip
        """Write Eq. 1 into logps, Eq. 3 into entropy and dL/dlogits (Eq. 7, 8) into dlogits."""
        self._launch(
            "one_pass",
            logits,
            logits,
            dlogits,
            *_tokens(t),
            t.support,
            index,
            first,
            logps,
            entropy,
        )

    def scale(self, dlogits: Tensor, upstream: Tensor) -> None:
        """Multiply dlogits in place by the 0-dim upstream; 1 reads and writes nothing."""
        self._launch("scale", dlogits, dlogits, dlogits, upstream)

    # Tokens.

    def prepare(self, p: Prepare) -> None:
        """Write the workspace: what the other kernels read of the caller's tensors."""
        mask = p.sampling_mask
        words = None
        if mask is not None:
            full = mask.missing_label == "full"
            words = (*mask.tensors(), mask.token_ids.shape[0], p.sampling_vocabulary, full)
        self._launch("prepare", p.tokens.workspace, *_tokens(p.tokens), *_prepare(p), words)

    def means(self, t: Tokens, logps: Tensor, upstream: Column, means: Tensor) -> None:
        """Write Eq. 9 of each group into means (2, G): μ - 1, and κ."""
        scratch = self.scratch(t)
        self._launch("means", t.workspace, *_tokens(t), logps, upstream, means, scratch)

    def finish(
        self, t: Tokens, logps: Tensor, entropy: Tensor | None, upstream: Column,
        means: Tensor | None, loss: Tensor, stats: Tensor, metrics: Tensor, dlogps: Tensor | None,
        dentropy: Tensor | None, logps_out: Tensor | None = None,
        entropy_out: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Write Eq. 5 and 10, the metrics and, where asked, dL/dlogp and dL/dH (Eq. 7, 9, 11).

        And copies of logps and entropy, where they are asked for.
        """
        scratch = self.scratch(t)
        self._launch(
            "finish", t.workspace, *_tokens(t), logps, entropy, upstream, means, loss,
            loss.dim() == 1, stats, metrics, dlogps, dentropy, logps_out, entropy_out, scratch,
        )  # fmt: skip

    def shard_parts(
        self, t: Tokens, words: int, logps: Tensor, top: Tensor, log_total: Tensor,
        entropy: Tensor | None, whole_top: Tensor, parts: Tensor,
    ) -> None:  # fmt: skip
        """Write into parts (4 or, with entropy, 5, N), float64, what the SUM of Eq. 30 adds."""
        self._launch(
            "shard_parts", t.workspace, *_tokens(t), words, logps, top, log_total, entropy,
            whole_top, parts,
        )  # fmt: skip

    def shard_combine(
        self, t: Tokens, parts: Tensor, ranks: int, logps: Tensor, log_total: Tensor,
        entropy: Tensor | None,
    ) -> None:  # fmt: skip
        """Write what follows from the sum of all ranks' parts (Eq. 30)."""
        self._launch(
            "shard_combine", t.workspace, *_tokens(t), ranks, parts, logps, log_total, entropy
        )

    # The sparse head. values of t.support: the logits of the kept words, then their gradients; the
    # head is that of Eq. 27, with logit_scale, and slopes (M,) are its softcap's, if it has one.

    def head_logits(
        self, t: Tokens, hidden: Tensor, weight: Tensor, scale: float, slopes: Tensor | None,
        bias: Tensor | None, softcap: float,
    ) -> None:  # fmt: skip
        """Write Eq. 27 into values, of each token's kept words, and into slopes."""
        self._launch(
            "head_logits", hidden, *_tokens(t), t.support, None, 0, hidden, weight, scale, slopes,
            bias, softcap,
        )  # fmt: skip

    def head_dhidden(
        self, t: Tokens, hidden: Tensor, weight: Tensor, scale: float, slopes: Tensor | None,
        dhidden: Tensor,
    ) -> None:  # fmt: skip
        """Write Eq. 28 into the rows of dhidden (N, H) of tokens that have a support."""
        self._launch(
            "head_dhidden", hidden, *_tokens(t), t.support, None, 0, hidden, weight, scale, slopes,
            dhidden, dhidden.dtype == torch.float32,
        )  # fmt: skip

    def head_dweight(
        self, t: Tokens, hidden: Tensor, weight: Tensor, scale: float, slopes: Tensor | None,
        by_word: Tensor, token_of: Tensor, dweight: Tensor | None, dbias: Tensor | None,
        on_top: bool,
    ) -> None:  # fmt: skip
        """Write Eq. 28 into every row of dweight (V, H) and dbias (V, 1), or add it.

        by_word and token_of (M,) int32: the places of all ids by word, and the token of each.
        """
        total = dbias if dweight is None else dweight
        assert total is not None
        self._launch(
            "head_dweight", hidden, *_tokens(t), t.support, None, 0, hidden, weight, scale, slopes,
            by_word, token_of, by_word.shape[0], dweight, dbias, total.dtype == torch.float32,
            on_top,
        )  # fmt: skip

    # The dual.

    def dual_step(
        self, coef: Tensor, weight: Tensor, d_sum: Tensor, d_sq_sum: Tensor, about_means: bool,
        target: float, lr: float, min_coef: float, max_coef: float,
    ) -> None:  # fmt: skip
        """Move the 0-dim coef once (Eq. 16), by statistics of groups (Eq. 10)."""
        self._launch(
            "dual_step", coef, coef, weight, d_sum, d_sq_sum, weight.numel(), about_means, target,
            lr, min_coef, max_coef,
        )  # fmt: skip
