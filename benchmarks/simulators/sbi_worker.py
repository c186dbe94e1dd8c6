"""Runs in the environment of sbi: the posterior of pairs, with that library's own defaults.

python sbi_worker.py GIVEN.npz FOUND.npz SEED
"""

import sys
import time

import numpy as np
import torch
from sbi.inference import NPE
from sbi.utils import BoxUniform

NUM_DRAWS = 10_000


def main():
    given = np.load(sys.argv[1])
    torch.manual_seed(int(sys.argv[3]))
    theta, x = (torch.as_tensor(given[name], dtype=torch.float32) for name in ("theta", "x"))
    bound = float(given["bound"])
    prior = None
    if np.isfinite(bound):
        ends = torch.full((theta.shape[1],), bound)
        prior = BoxUniform(-ends, ends)
    began = time.perf_counter()
    inference = NPE(prior=prior, density_estimator="nsf", show_progress_bars=False)
    estimator = inference.append_simulations(theta, x).train()
    seconds = time.perf_counter() - began
    draws = []
    for observation in torch.as_tensor(given["observations"], dtype=torch.float32):
        if prior is None:
            found = estimator.sample((NUM_DRAWS,), condition=observation[None])[:, 0]
        else:
            posterior = inference.build_posterior(estimator)
            found = posterior.sample((NUM_DRAWS,), x=observation, show_progress_bars=False)
        draws.append(found.detach().numpy())
    np.savez(sys.argv[2], draws=np.stack(draws), seconds=seconds)


if __name__ == "__main__":
    main()
