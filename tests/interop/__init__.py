import jax

import flowvi as fv


def unfitted(target):
    """A posterior that nothing was learned for: it is what becomes of its draws that counts."""
    family = fv.mean_field(target.event_size)
    params = family.init(jax.random.key(0))
    result = fv.FitResult(params, {}, "max_steps", 0, 0, None, 0.0)
    return fv.Posterior(result=result, target=target, family=family, start=None, diagnosis=None)
