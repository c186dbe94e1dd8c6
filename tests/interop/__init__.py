import jax

import flowvi as fv


def unfitted(target, family=None, params=None):
    """A posterior that nothing was learned for: it is what becomes of its draws that counts."""
    family = fv.mean_field(target.event_size) if family is None else family
    params = family.init(jax.random.key(0)) if params is None else params
    result = fv.FitResult(params, {}, "max_steps", 0, 0, None, 0.0)
    return fv.Posterior(result=result, target=target, family=family, start=None, diagnosis=None)
