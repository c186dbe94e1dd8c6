"""zuko."""

import torch
import zuko
from protocol import serve, torch_density, torch_task

ACTIVATIONS = {"silu": torch.nn.SiLU, "relu": torch.nn.ReLU, "tanh": torch.nn.Tanh}


def build(task, size):
    torch.manual_seed(0)
    flow = zuko.flows.MAF(
        size["event_size"],
        transforms=size["layers"],
        hidden_features=size["hidden"],
        activation=ACTIVATIONS[size["activation"]],
    )
    if task.startswith("iaf"):
        transforms = [transform.inv for transform in flow.transform.transforms]
        flow = zuko.lazy.Flow(transforms, flow.base)
    return torch_task(
        task,
        size,
        flow,
        lambda x: flow().log_prob(x),
        lambda: flow().sample((size["batch"],)),
    )


def density(x, context, seed):
    """The flow of its tutorial: three layers of splines, Adam at 1e-3."""
    torch.manual_seed(seed)
    size = 0 if context is None else context.shape[1]
    flow = zuko.flows.NSF(x.shape[1], size, transforms=3, hidden_features=(128, 128))

    return torch_density(flow, x, context, lambda x, c: flow(c).log_prob(x))


if __name__ == "__main__":
    serve(["zuko", "torch"], build, density=density)
