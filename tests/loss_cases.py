"""On ranks: an output layer cut along the vocabulary, unevenly, against the whole one."""

import torch.distributed as dist
from test_losses import WORDS, head, inputs, told

from lora_scale.parallel import losses
from lora_scale.parallel.world import World
from lora_scale.spec import output


def cut_head(here: World) -> dict[str, float]:
    """Relative errors of the loss and of its gradient, summed over the ranks; both in three chunks."""
    output.LARGEST = 128 * WORDS * 8
    x, labels = inputs()
    loss, dx = told(head(), x, labels)
    starts = [round(WORDS * rank / here.size) for rank in range(here.size + 1)]
    first, last = starts[here.rank : here.rank + 2]
    part = head()
    part.weight.data = part.weight.data[first:last].clone()
    part.cut = losses.Cut(first, dist.group.WORLD)
    output.LARGEST = 128 * (last - first) * 8
    own_loss, own_dx = told(part, x, labels)
    dist.all_reduce(own_dx)
    return {"loss": (own_loss / loss - 1).abs().item(), "dx": ((own_dx - dx).norm() / dx.norm()).item()}
