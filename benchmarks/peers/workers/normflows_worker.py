"""normflows. Its affine autoregressive layer is an IAF; a MAF is its reverse."""

import normflows as nf
import torch
from normflows.flows.base import Reverse
from protocol import Absent, serve, torch_density, torch_task
from torch.nn import functional


def build(task, size):
    flows = []
    for _ in range(size["layers"]):
        # One block after the first layer: two hidden layers.
        layer = nf.flows.MaskedAffineAutoregressive(
            size["event_size"],
            size["hidden"][0],
            num_blocks=len(size["hidden"]) - 1,
            use_residual_blocks=False,
            activation=getattr(functional, size["activation"]),
        )
        layer = Reverse(layer) if task.startswith("maf") else layer
        flows += [layer, nf.flows.Permute(size["event_size"])]
    base = nf.distributions.DiagGaussian(size["event_size"], trainable=False)
    flow = nf.NormalizingFlow(base, flows)
    return torch_task(task, size, flow, flow.log_prob, lambda: flow.sample(size["batch"])[0])


def density(x, context, seed):
    """The flow of its tutorial on neural splines."""
    torch.manual_seed(seed)
    if context is not None:
        raise Absent("its layers of splines take no context")
    size = x.shape[1]
    flows = []
    for _ in range(4):
        flows += [
            nf.flows.AutoregressiveRationalQuadraticSpline(size, 2, 128),
            nf.flows.LULinearPermute(size),
        ]
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(size, trainable=False), flows)

    return torch_density(flow, x, context, lambda x, c: flow.log_prob(x))


if __name__ == "__main__":
    serve(["normflows", "torch"], build, density=density)
