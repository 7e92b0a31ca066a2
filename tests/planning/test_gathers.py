"""What ZeRO-3 holds of gathered parameters, on visits written by hand."""

import pytest

from mmpeft_ds.engine.zero.resident import Rules, Tensors
from mmpeft_ds.planning.gathers import gathers
from mmpeft_ds.planning.visits import Visit

PARAMETERS = [Tensors(numel=n, width=2, trained=False) for n in (10, 20, 30)]
ACTIVATIONS = 7


def visit(module: int, fetch: bool) -> Visit:
    """Of module i, which has parameter i alone; module 3 has all of them."""
    own = (0, 1, 2) if module == 3 else (module,)
    return Visit(fetch, True, False, module, own, own, True, ACTIVATIONS, ACTIVATIONS)


@pytest.mark.parametrize(
    ("ahead", "modules", "most"),
    [
        (0, [0, 1, 2], 2 * 30),  # one by one, each in what it came in
        (0, [3], 2 * 2 * 60),  # together: the buffer lies beside the copies
        (100, [0, 1, 2], 2 * 2 * (20 + 30)),  # the last two come ahead, and the buffer stays until the third is needed
    ],
)
def test_parameters_that_come_together_lie_twice_until_the_last_of_them_is_needed(ahead, modules, most):
    visits = [visit(module, fetch) for module in modules for fetch in (True, False)]
    rules = Rules(prefetch_bucket_size=ahead, param_persistence_threshold=0, max_reuse_distance=0)
    found = gathers(visits, PARAMETERS, rules)
    assert (found.most_live, found.together, found.left) == (most, most + ACTIVATIONS, 0)
