"""C++ kernels over logits on a CPU (csrc/): log-probs forward and backward, one-pass, scaling.

The launchers take what those of triton_kernels.py take, already checked, and hand over addresses
and sizes. What an address stands for stays alive in the caller's frame.
"""

import json
from pathlib import Path

import torch


def build_report():
    """What setup.py says of the extension."""
    path = Path(__file__).with_name("build_report.json")
    return json.loads(path.read_text()).get("cpp", "not built") if path.exists() else "not built"


try:
    from . import _cpp
except ImportError as error:
    raise ImportError(f"{build_report()}; {error}") from error

DTYPES = {
    torch.float32: _cpp.Dtype.float32,
    torch.bfloat16: _cpp.Dtype.bfloat16,
    torch.float16: _cpp.Dtype.float16,
}
KL_ESTIMATORS = {"k1": _cpp.KL.k1, "k2": _cpp.KL.k2, "k3": _cpp.KL.k3}
# What the processor has, the best last.
INSTRUCTION_SETS = _cpp.instruction_sets()
INSTRUCTION_SET = list(INSTRUCTION_SETS)[-1]


def _kernels():
    return INSTRUCTION_SETS[INSTRUCTION_SET]


def advise_huge_pages(fresh):
    """Ask for them for memory that nobody has touched: page faults are most of what it costs."""
    _cpp.advise_huge_pages(fresh.data_ptr(), fresh.numel() * fresh.element_size())


def _rows(logits, dlogits=None):
    strides = logits.stride()[:2]
    address, grad_strides = 0, (0, 0)
    if dlogits is not None:
        address, grad_strides = dlogits.data_ptr(), dlogits.stride()[:2]
        if dlogits is not logits:
            advise_huge_pages(dlogits)
    return _cpp.Rows(
        DTYPES[logits.dtype], *logits.shape, logits.data_ptr(), *strides, address, *grad_strides,
        torch.get_num_threads(),
    )  # fmt: skip


def _addresses(*tensors):
    return [0 if x is None else x.data_ptr() for x in tensors]


def logps_forward(logits, labels, temperature, logps, top, log_total, entropy, with_entropy):
    """Write Eq. 1 into logps, Eq. 3 into entropy, and for logps_backward top and log_total."""
    entropy = entropy if with_entropy else None
    addresses = _addresses(labels, temperature, logps, top, log_total, entropy)
    _kernels().logps_forward(_rows(logits), *addresses)


def logps_backward(
    logits, dlogits, labels, temperature, logps, top, log_total, entropy, grad_logps,
    grad_entropy, with_entropy,
):  # fmt: skip
    """Write into dlogits the gradient of logps and, with entropy, that of entropy (Eq. 8)."""
    entropy = entropy if with_entropy else None
    addresses = _addresses(
        labels, temperature, logps, top, log_total, entropy, grad_logps, grad_entropy
    )
    _kernels().logps_backward(_rows(logits, dlogits), *addresses)


def one_pass(
    logits, dlogits, labels, temperature, weight, old_logps, advantages, variance_coef, center,
    ref_logps, kl_coef, entropy_coef, log_ratio_clamp, kl_estimator, logps, entropy, with_entropy,
):  # fmt: skip
    """Write Eq. 1 into logps, Eq. 3 into entropy and dL/dlogits (Eq. 7, 8) into dlogits."""
    per_token = _addresses(
        labels, temperature, weight, old_logps, advantages, variance_coef, center, ref_logps
    )
    numbers = [x.item() for x in (kl_coef, entropy_coef, log_ratio_clamp)]
    kl = _cpp.KL.none if ref_logps is None else KL_ESTIMATORS[kl_estimator]
    outputs = _addresses(logps, entropy if with_entropy else None)
    _kernels().one_pass(_rows(logits, dlogits), *per_token, *numbers, kl, *outputs)


def scale(dlogits, upstream):
    """Multiply dlogits in place by the 0-dim upstream; 1 reads and writes nothing."""
    factor = upstream.item()
    if factor != 1.0:
        _kernels().scale(_rows(dlogits, dlogits), factor)
