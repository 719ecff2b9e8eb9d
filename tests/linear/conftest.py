"""How the products of halves are made."""

import pytest

from r2vpo_kernels.sources import products


@pytest.fixture(scope="module", params=["native", "float32"])
def halves(request):
    """How a CPU multiplies them, whatever its units; in blocks of which a product needs several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("R2VPO_KERNELS_HALF_PRODUCTS", request.param)
        patch.setattr(products, "SIDE", 8)
        patch.setattr(products, "ALIGNED", 4)
        patch.setattr(products, "TILE", {"elsewhere": 100})
        yield request.param
