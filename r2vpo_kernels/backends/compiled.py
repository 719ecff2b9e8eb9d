"""What backends of compiled code share: from checked tensors to addresses and sizes (csrc/bind.h).

A launch takes one flat tuple of numbers, in the order of the structs in csrc/kernels.h. What an
address stands for stays alive in the caller's frame.
"""

from __future__ import annotations

import importlib
import json
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


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


class Launchers:
    """The launchers of a module; they take what those of every backend take."""

    def __init__(self, module: Any) -> None:
        self.dtypes = {getattr(torch, name): value for name, value in module.DTYPES.items()}
        self.kl_estimators = {None: 0, **module.KL}

    # What a backend says of itself.

    def kernels(self) -> Any:
        """The module's Kernels."""
        raise NotImplementedError

    def launch_target(self, x: Tensor) -> tuple[int, ...]:
        """Who computes on tensors that lie where x does: the module's target."""
        raise NotImplementedError

    def scratch(self, t: Tokens) -> Tensor | None:
        """Memory for the partial sums of `means` and `finish`, if they need any from here."""
        return None

    def before_filling(self, dlogits: Tensor) -> None:
        """Called with memory that may be untouched, and is about to be written."""

    # Structs, flat.

    def _column(self, column: Column) -> tuple[int, int, int, int]:
        x, stride_unit, stride_token = column
        if x is None:
            return 0, 0, 0, 0
        return x.data_ptr(), self.dtypes[x.dtype], stride_unit, stride_token

    def _vector(self, x: Tensor | None) -> tuple[int, int, int, int]:
        """A column of one number for each unit, or of one number."""
        if x is None:
            return 0, 0, 0, 0
        return x.data_ptr(), self.dtypes[x.dtype], x.stride(0) if x.dim() else 0, 0

    def _tokens(self, t: Tokens) -> tuple[int, ...]:
        return (
            t.workspace.data_ptr(), t.tokens, t.units, t.groups, t.parts, t.on_policy,
            t.sequence_level, self.kl_estimators[t.kl],
        )  # fmt: skip

    def _rows(self, logits: Tensor, dlogits: Tensor | None) -> tuple[int, ...]:
        batch, length, vocabulary = logits.shape
        stride_batch, stride_token, _ = logits.stride()
        gradient: tuple[int, ...] = 0, 0, 0
        if dlogits is not None:
            if dlogits is not logits:
                self.before_filling(dlogits)
            gradient = dlogits.data_ptr(), dlogits.stride(0), dlogits.stride(1)
        return (
            self.dtypes[logits.dtype], batch, length, vocabulary, logits.data_ptr(), stride_batch,
            stride_token, *gradient,
        )  # fmt: skip

    def _launch(self, name: str, x: Tensor, *arguments: float) -> None:
        getattr(self.kernels(), name)((*self.launch_target(x), *arguments))

    # Rows. Row r belongs to token index[r], or to first + r without an index.

    def logps_forward(
        self, logits: Tensor, t: Tokens, index: Tensor | None, first: int, logps: Tensor,
        top: Tensor, log_total: Tensor, entropy: Tensor | None,
    ) -> None:  # fmt: skip
        """Write Eq. 1 into logps, Eq. 3 into entropy, and for logps_backward top and log_total."""
        self._launch(
            "logps_forward", logits, *self._rows(logits, None), *self._tokens(t), address(index),
            first, logps.data_ptr(), top.data_ptr(), log_total.data_ptr(), address(entropy),
        )  # fmt: skip

    def logps_backward(
        self, logits: Tensor, dlogits: Tensor, t: Tokens, index: Tensor | None, first: int,
        logps: Tensor, top: Tensor, log_total: Tensor, entropy: Tensor | None, grad_logps: Tensor,
        grad_entropy: Tensor | None, upstream: Tensor | None,
    ) -> None:  # fmt: skip
        """Write into dlogits the gradient of logps and, with entropy, that of entropy (Eq. 8)."""
        self._launch(
            "logps_backward", logits, *self._rows(logits, dlogits), *self._tokens(t),
            address(index), first, logps.data_ptr(), top.data_ptr(), log_total.data_ptr(),
            address(entropy), grad_logps.data_ptr(), address(grad_entropy), address(upstream),
        )  # fmt: skip

    def one_pass(
        self, logits: Tensor, dlogits: Tensor, t: Tokens, index: Tensor | None, first: int,
        logps: Tensor, entropy: Tensor | None,
    ) -> None:  # fmt: skip
        """Write Eq. 1 into logps, Eq. 3 into entropy and dL/dlogits (Eq. 7, 8) into dlogits."""
        self._launch(
            "one_pass", logits, *self._rows(logits, dlogits), *self._tokens(t), address(index),
            first, logps.data_ptr(), address(entropy),
        )  # fmt: skip

    def scale(self, dlogits: Tensor, upstream: Tensor) -> None:
        """Multiply dlogits in place by the 0-dim upstream; 1 reads and writes nothing."""
        self._launch("scale", dlogits, *self._rows(dlogits, dlogits), upstream.data_ptr())

    # Tokens.

    def prepare(self, p: Prepare) -> None:
        """Write the workspace: what the other kernels read of the caller's tensors."""
        column, vector = self._column, self._vector
        tensor = p.numbers if isinstance(p.numbers, Tensor) else None
        numbers = (0.0,) * 6 if isinstance(p.numbers, Tensor) else p.numbers
        self._launch(
            "prepare", p.tokens.workspace, *self._tokens(p.tokens),
            *column(p.advantages), *column(p.labels), *column(p.mask), *column(p.old_logps),
            *column(p.importance_weights), *column(p.variance_coef), *column(p.temperature),
            *column(p.ref_logps), *column(p.logps), *column(p.entropy),
            *vector(p.cu_seqlens), *vector(p.group_ids), *vector(p.center), *vector(p.normalizer),
            p.unit_length, p.units_per_group, p.ignore_index, p.vocabulary, p.first_word, p.words,
            p.mean_over_unit, p.count_kind, *numbers, address(tensor),
            address(p.logps_out), address(p.entropy_out), address(p.activity),
        )  # fmt: skip

    def means(self, t: Tokens, logps: Tensor, upstream: Column, means: Tensor) -> None:
        """Write Eq. 9 of each group into means (2, G): μ - 1, and κ."""
        scratch = self.scratch(t)
        self._launch(
            "means", t.workspace, *self._tokens(t), logps.data_ptr(), *self._column(upstream),
            means.data_ptr(), address(scratch),
        )  # fmt: skip

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
            "finish", t.workspace, *self._tokens(t), logps.data_ptr(), address(entropy),
            *self._column(upstream), address(means), loss.data_ptr(), loss.dim() == 1,
            stats.data_ptr(), metrics.data_ptr(), address(dlogps), address(dentropy),
            address(logps_out), address(entropy_out), address(scratch),
        )  # fmt: skip

    def shard_parts(
        self, t: Tokens, words: int, logps: Tensor, top: Tensor, log_total: Tensor,
        entropy: Tensor | None, whole_top: Tensor, parts: Tensor,
    ) -> None:  # fmt: skip
        """Write into parts (4 or, with entropy, 5, N), float64, what the SUM of Eq. 30 adds."""
        self._launch(
            "shard_parts", t.workspace, *self._tokens(t), words, logps.data_ptr(), top.data_ptr(),
            log_total.data_ptr(), address(entropy), whole_top.data_ptr(), parts.data_ptr(),
        )  # fmt: skip

    def shard_combine(
        self, t: Tokens, parts: Tensor, ranks: int, logps: Tensor, log_total: Tensor,
        entropy: Tensor | None,
    ) -> None:  # fmt: skip
        """Write what follows from the sum of all ranks' parts (Eq. 30)."""
        self._launch(
            "shard_combine", t.workspace, *self._tokens(t), ranks, parts.data_ptr(),
            logps.data_ptr(), log_total.data_ptr(), address(entropy),
        )  # fmt: skip

    # The dual.

    def dual_step(
        self, coef: Tensor, weight: Tensor, d_sum: Tensor, d_sq_sum: Tensor, about_means: bool,
        target: float, lr: float, min_coef: float, max_coef: float,
    ) -> None:  # fmt: skip
        """Move the 0-dim coef once (Eq. 16), by statistics of groups (Eq. 10)."""
        self._launch(
            "dual_step", coef, coef.data_ptr(), weight.data_ptr(), d_sum.data_ptr(),
            d_sq_sum.data_ptr(), weight.numel(), about_means, target, lr, min_coef, max_coef,
        )  # fmt: skip
