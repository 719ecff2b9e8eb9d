"""Reading the workspace that `prepare` wrote; calls.py says what lies where."""

import triton
import triton.language as tl

from .. import calls

TICKETS = tl.constexpr(calls.TICKETS)
SHARD_FAULT = tl.constexpr(calls.SHARD_FAULT)
COUNTS = tl.constexpr(calls.COUNTS)
FAULTS = tl.constexpr(calls.FAULTS)
MOST_PARTS = tl.constexpr(calls.MOST_PARTS)
HEADER = tl.constexpr(calls.HEADER)
ROWS = tl.constexpr(calls.ROWS)

# The numbers in front.
CLAMP = tl.constexpr(0)
KL_COEF = tl.constexpr(1)
ENTROPY_COEF = tl.constexpr(2)
FACTOR = tl.constexpr(3)
CLIP_LOW = tl.constexpr(4)
CLIP_HIGH = tl.constexpr(5)
DUAL_CLIP = tl.constexpr(6)

# The rows of tokens, after that of the labels, the last three of them integers too, and the rows of
# units, which are integers.
TEMPERATURE = tl.constexpr(1)
TOKEN_WEIGHT = tl.constexpr(2)
OLD_LOGP = tl.constexpr(3)
ADVANTAGE = tl.constexpr(4)
VARIANCE_COEF = tl.constexpr(5)
CENTER = tl.constexpr(6)
REF_LOGP = tl.constexpr(7)
SUPPORT_BEGIN = tl.constexpr(8)
SUPPORT_COUNT = tl.constexpr(9)
SUPPORT_SIZE = tl.constexpr(10)
BEGIN = tl.constexpr(0)
END = tl.constexpr(1)
GROUP = tl.constexpr(2)


@triton.jit
def integers(workspace):
    return workspace.to(tl.pointer_type(tl.int32), bitcast=True)


# A token's numbers lie `tokens` apart, from HEADER + token on; then a unit's, `units` apart.


@triton.jit
def units_of(workspace, tokens):
    return integers(workspace) + HEADER + tokens * ROWS


@triton.jit
def denominator(workspace, parts):
    """D of Eq. 4."""
    part = tl.arange(0, MOST_PARTS)
    counts = tl.load(integers(workspace) + COUNTS + part, mask=part < parts, other=0)
    found = tl.sum(counts, 0).to(tl.float32) * tl.load(workspace + FACTOR)
    return tl.where(found == 0, 1.0, found)
