"""What backends of compiled code share: from checked tensors to addresses and sizes (csrc/bind.h).

What an address stands for stays alive in the caller's frame.
"""

import importlib
import json
from contextlib import nullcontext
from pathlib import Path

import torch


def build_report(name):
    """What setup.py says of an extension."""
    path = Path(__file__).with_name("build_report.json")
    return json.loads(path.read_text()).get(name, "not built") if path.exists() else "not built"


def load(name):
    """The module of an extension, or an ImportError that says why there is none."""
    try:
        return importlib.import_module(f"._{name}", __package__)
    except ImportError as error:
        raise ImportError(f"{build_report(name)}; {error}") from error


def _addresses(*tensors):
    return [0 if x is None else x.data_ptr() for x in tensors]


class Launchers:
    """The launchers of a module; they take what those of triton_kernels.py take."""

    def __init__(self, module):
        self.module = module
        self.dtypes = {
            torch.float32: module.Dtype.float32,
            torch.bfloat16: module.Dtype.bfloat16,
            torch.float16: module.Dtype.float16,
        }
        kl = module.KL
        self.kl_estimators = {None: kl.none, "k1": kl.k1, "k2": kl.k2, "k3": kl.k3}

    def kernels(self):
        """The module's Kernels."""
        raise NotImplementedError

    def where(self, logits, dlogits):
        """What the module's Rows take last: who computes."""
        raise NotImplementedError

    def device(self, logits):
        """The context of a launch."""
        return nullcontext()

    def _launch(self, name, logits, dlogits, *arguments):
        address, grad_strides = 0, (0, 0)
        if dlogits is not None:
            address, grad_strides = dlogits.data_ptr(), dlogits.stride()[:2]
        rows = self.module.Rows(
            self.dtypes[logits.dtype], *logits.shape, logits.data_ptr(), *logits.stride()[:2],
            address, *grad_strides, *self.where(logits, dlogits),
        )  # fmt: skip
        with self.device(logits):
            getattr(self.kernels(), name)(rows, *arguments)

    def logps_forward(
        self, logits, labels, temperature, logps, top, log_total, entropy, with_entropy
    ):
        """Write Eq. 1 into logps, Eq. 3 into entropy, and for logps_backward top and log_total."""
        entropy = entropy if with_entropy else None
        addresses = _addresses(labels, temperature, logps, top, log_total, entropy)
        self._launch("logps_forward", logits, None, *addresses)

    def logps_backward(
        self, logits, dlogits, labels, temperature, logps, top, log_total, entropy, grad_logps,
        grad_entropy, with_entropy,
    ):  # fmt: skip
        """Write into dlogits the gradient of logps and, with entropy, that of entropy (Eq. 8)."""
        entropy = entropy if with_entropy else None
        addresses = _addresses(
            labels, temperature, logps, top, log_total, entropy, grad_logps, grad_entropy
        )
        self._launch("logps_backward", logits, dlogits, *addresses)

    def one_pass(
        self, logits, dlogits, labels, temperature, weight, old_logps, advantages, variance_coef,
        center, ref_logps, kl_coef, entropy_coef, log_ratio_clamp, kl_estimator, logps, entropy,
        with_entropy,
    ):  # fmt: skip
        """Write Eq. 1 into logps, Eq. 3 into entropy and dL/dlogits (Eq. 7, 8) into dlogits."""
        inputs = _addresses(
            labels, temperature, weight, old_logps, advantages, variance_coef, center, ref_logps,
            kl_coef, entropy_coef, log_ratio_clamp,
        )  # fmt: skip
        kl = self.kl_estimators[None if ref_logps is None else kl_estimator]
        outputs = _addresses(logps, entropy if with_entropy else None)
        self._launch("one_pass", logits, dlogits, *inputs, kl, *outputs)

    def scale(self, dlogits, upstream):
        """Multiply dlogits in place by the 0-dim upstream; 1 reads and writes nothing."""
        self._launch("scale", dlogits, dlogits, upstream.data_ptr())
