"""zuko."""

import torch
import zuko
from protocol import serve, torch_task

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


if __name__ == "__main__":
    serve(["zuko", "torch"], build)
