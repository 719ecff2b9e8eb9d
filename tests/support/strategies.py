"""What hypothesis draws: the shape and kind of a batch; torch makes the data from a seed."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from r2vpo_kernels import SamplingMask, token_logps
from r2vpo_kernels.checks import REDUCTIONS, MissingLabel
from r2vpo_kernels.reference import Support, linear_logits

IGNORE = -100
VOCABULARIES = (1, 2, 7, 8, 16, 33, 40, 64, 129, 200)
if os.environ.get("R2VPO_TEST_DEVICE") == "cuda":
    # Several steps of a row there, by either row of Triton's table; small_steps.py is for a CPU.
    VOCABULARIES += (4099, 9000, 25000)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of a sampling mask: none at all, or the kind of its sets (`sets_of`).
SUPPORTS = ("none", "single", "small", "some empty", "all words", "some missing")


@dataclass
class Case:
    """A drawn call of `r2vpo_loss`: shapes and kinds, from which `tensors` makes the data."""

    batch: int
    length: int
    vocabulary: int
    dtype: torch.dtype
    layout: str
    packed: bool
    masking: str
    groups: str
    reduction: str
    center: str
    level: str
    policy_loss: str
    dual_clip: bool
    variance_coef: str
    advantages: str
    temperature: str
    kl: str | None
    kl_unbiased: bool
    entropy: bool
    on_policy: bool
    support: str
    seed: int
    scale: float = 3.0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def tensors(
        self, device: torch.device, logits: Tensor | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """(logits, labels, keywords): old_logps and advantages are among the keywords."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        B, T, V = self.batch, self.length, self.vocabulary
        if logits is None:
            logits = laid_out((self.scale * normal(B, T, V)).to(self.dtype), self.layout)
        labels = torch.randint(0, V, (B, T), generator=generator)
        sampling_mask = sampling_mask_of(self.support, labels, V, generator)
        mask = None
        if self.masking == "ignore":
            labels[torch.rand(B, T, generator=generator) < 0.4] = IGNORE
        elif self.masking != "none":
            keep = torch.rand(B, T, generator=generator) < 0.6
            if self.masking == "all":
                keep[:] = False
            mask = keep.to(getattr(torch, "bool" if self.masking == "all" else self.masking))

        def per(kind: str, x: Tensor) -> Any:
            if kind == "number":
                return x.reshape(-1)[0].item()
            if kind == "scalar":
                return x.reshape(-1)[0]
            return x[:, 0].clone() if kind == "sequence" else x

        hot = per(self.temperature, 0.6 + normal(B, T).abs())
        divisor = torch.as_tensor(hot)
        divisor = divisor[:, None, None] if divisor.dim() == 1 else divisor[..., None]
        x = logits.float() / divisor
        if sampling_mask is not None:
            support, _ = Support.of(sampling_mask, labels.reshape(-1))
            x = torch.where(support.words(V).view(B, T, V), x, -torch.inf)
        log_p = torch.log_softmax(x, -1)
        logps = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        keywords: dict[str, Any] = {
            "old_logps": None if self.on_policy else logps + 0.4 * normal(B, T),
            "advantages": per(self.advantages, normal(B, T)),
            "variance_coef": per(self.variance_coef, normal(B, T).abs() + 0.1),
            "temperature": hot,
            "mask": mask,
            "reduction": self.reduction,
            "ratio_level": self.level,
            "center": self.center,
            "entropy_coef": 0.3 if self.entropy else 0.0,
        }
        if sampling_mask is not None:
            keywords["sampling_mask"] = sampling_mask.to(device)
        if self.seed % 2:
            keywords["importance_weights"] = normal(B, T).abs()
        if self.kl:
            keywords["ref_logps"] = logps + 0.5 * normal(B, T)
            keywords |= {"kl_coef": 0.2, "kl_estimator": self.kl, "kl_unbiased": self.kl_unbiased}
        if self.policy_loss != "ratio":
            keywords |= {"policy_loss": self.policy_loss, "clip_range": (0.2, 0.3)}
        if self.policy_loss == "clip" and self.dual_clip:
            keywords["dual_clip"] = 1.4
        groups = 1
        if self.groups == "size":
            groups = 2 if B % 2 == 0 else B
            keywords["group_size"] = B // groups
        elif self.groups == "ids":
            groups = 3
            keywords["group_ids"] = torch.randint(0, groups, (B,), generator=generator)
            keywords["num_groups"] = groups
        if self.center == "given":
            keywords["center"] = 1.0 + 0.2 * normal(groups)
        if self.packed:
            # The same rows end to end, cut into the same sequences.
            keywords = {
                k: v.reshape(-1) if isinstance(v, Tensor) and v.shape == (B, T) else v
                for k, v in keywords.items()
            }
            keywords["cu_seqlens"] = torch.arange(B + 1) * T
            if self.reduction == "seq-mean-token-sum-norm":
                keywords["normalizer"] = float(B * T)
            logits, labels = logits.reshape(B * T, V), labels.reshape(-1)
        keywords |= self.extra
        keywords = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in keywords.items()}
        return moved(logits, device), labels.to(device), keywords


def sets_of(
    kind: str, labels: list[int], vocabulary: int, generator: torch.Generator
) -> list[list[int] | None]:
    """A set for each label, its ids in no order; None is the full vocabulary.

    "single" the label alone, "small" it and a few others, "some empty" some of these the full
    vocabulary, "all words", "some missing" some of them without their label.
    """

    def drawn(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def one(label: int) -> list[int] | None:
        order = torch.randperm(vocabulary, generator=generator).tolist()
        if kind == "single":
            return [label]
        if kind == "all words":
            return order
        if kind == "some empty" and drawn(0, 2):
            return None
        few = order[: drawn(1, 9)]
        if kind == "some missing" and drawn(0, 2):
            return [word for word in few if word != label]
        return few if label in few else [*few, label]

    return [one(label) for label in labels]


def sampling_mask_of(
    kind: str, labels: Tensor, vocabulary: int, generator: torch.Generator
) -> SamplingMask | None:
    if kind == "none":
        return None
    sets = sets_of(kind, labels.reshape(-1).tolist(), vocabulary, generator)
    missing_label: MissingLabel = "full" if kind == "some missing" else "error"
    return SamplingMask.from_lists(sets, missing_label=missing_label)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of x (B, T, V) in another layout; the vocabulary stays contiguous."""
    B, T, V = x.shape
    if layout == "shifted":
        return torch.cat([x, x[:, :1]], 1)[:, :-1]
    if layout == "late":
        return torch.cat([x[:, :1], x], 1)[:, 1:]
    if layout == "padded":
        return torch.cat([x, x[..., :1], x[..., :1]], -1)[..., :V]
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expanded":
        return x[:1].expand(B, T, V)
    return x


def moved(x: Tensor, device: torch.device) -> Tensor:
    """x on the device in its layout; `to` alone would close the gaps of a view."""
    memory = x.new_empty(0).set_(x.untyped_storage())
    return memory.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


@st.composite
def cases(draw, **fixed: Any) -> Case:
    def pick(name: str, *values: Any) -> Any:
        return fixed[name] if name in fixed else draw(st.sampled_from(values), label=name)

    packed = pick("packed", False, True)
    per_sequence = "token" if packed and draw(st.booleans()) else "sequence"
    case = Case(
        batch=fixed.get("batch") or draw(st.integers(1, 4), label="batch"),
        length=fixed.get("length") or draw(st.integers(1, 5), label="length"),
        vocabulary=pick("vocabulary", *VOCABULARIES),
        dtype=pick("dtype", *DTYPES),
        layout=pick("layout", "plain", "shifted", "late", "padded", "transposed", "expanded"),
        packed=packed,
        masking=pick("masking", "none", "ignore", "bool", "uint8", "int32", "float32", "all"),
        groups=pick("groups", "none", "size", "ids"),
        reduction=pick("reduction", *REDUCTIONS),
        center=pick("center", "one", "group", "given"),
        level=pick("level", "token", "sequence"),
        policy_loss=pick("policy_loss", "ratio", "clip", "cispo"),
        dual_clip=pick("dual_clip", False, True),
        variance_coef=pick("variance_coef", "number", "scalar", "sequence", "token"),
        advantages=pick("advantages", per_sequence, "token"),
        temperature=pick("temperature", "number", "sequence", "token"),
        kl=pick("kl", None, "k1", "k2", "k3"),
        kl_unbiased=pick("kl_unbiased", False, True),
        entropy=pick("entropy", False, True),
        on_policy=pick("on_policy", False, False, True),
        support=pick("support", "none", *SUPPORTS),
        seed=draw(st.integers(0, 2**16), label="seed"),
    )
    case.extra = fixed.get("extra", {})
    return case


@dataclass
class LinearCase:
    """A drawn call of `linear_r2vpo_loss`: a head and hidden states for the rest of a `Case`."""

    case: Case
    width: int
    bias: bool
    column_major: tuple[str, ...]
    head: dict[str, Any]

    def tensors(
        self, device: torch.device
    ) -> tuple[dict[str, Tensor], Tensor, dict[str, Any], dict[str, Any]]:
        """(inputs, labels, keywords of the head, the other keywords)."""
        case, H = self.case, self.width
        generator = torch.Generator().manual_seed(case.seed + 1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        spread = case.scale / H**0.5
        inputs = {
            "hidden": laid_out(normal(case.batch, case.length, H).to(case.dtype), case.layout),
            "weight": (spread * normal(case.vocabulary, H)).to(case.dtype),
        }
        if self.bias:
            inputs["bias"] = normal(case.vocabulary).to(case.dtype)
        exact = {name: x.double() for name, x in inputs.items()}
        logits = linear_logits(
            exact["hidden"], exact["weight"], exact.get("bias"), self.head["softcap"],
            self.head["logit_scale"],
        )  # fmt: skip
        _, labels, keywords = case.tensors(device, logits.float())
        if case.packed:
            inputs["hidden"] = inputs["hidden"].reshape(-1, H)
        inputs = {name: moved(x, device) for name, x in inputs.items()}
        for name in self.column_major:
            inputs[name] = inputs[name].mT.contiguous().mT
        return inputs, labels, self.head, keywords


@st.composite
def linear_cases(draw, **fixed: Any) -> LinearCase:
    head = {
        "softcap": draw(st.sampled_from([None, None, 4.0])),
        "logit_scale": draw(st.sampled_from([1.0, 1.0, 0.5, -1.5])),
        "logits_dtype": draw(st.sampled_from([None, None, torch.float32])),
        "chunk_tokens": draw(st.sampled_from([None, 1, 3, 5, 100])),
        "compact": draw(st.booleans()),
    }
    width = draw(st.sampled_from([1, 5, 16, 24]))
    column_major = draw(st.sampled_from([(), (), ("hidden",), ("weight",)]))
    return LinearCase(draw(cases(**fixed)), width, draw(st.booleans()), column_major, head)


def drawn(strategy: st.SearchStrategy, count: int) -> list[Any]:
    """So many cases, for what cannot be drawn where it runs: processes that act together."""
    found: list[Any] = []

    @settings(max_examples=count, derandomize=True, database=None, phases=[Phase.generate])
    @given(strategy)
    def collect(case):
        found.append(case)

    collect()
    return found


def uneven_rows(vocabulary: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(logits, labels, keywords) of rows at random, rising, falling, and -inf but for the end."""
    torch.manual_seed(0)
    logits = torch.randn(1, 4, vocabulary)
    rising = torch.linspace(-30.0, 30.0, vocabulary)
    logits[0, 1] += rising
    logits[0, 2] -= rising
    logits[0, 3, : vocabulary - 9] = -torch.inf
    labels = torch.tensor([[0, vocabulary // 2, vocabulary - 1, vocabulary - 2]])
    keywords = {
        "old_logps": token_logps(logits, labels, backend="eager") + 0.2,
        "advantages": torch.tensor([0.7]), "entropy_coef": 0.1,
    }  # fmt: skip
    return logits, labels, keywords
