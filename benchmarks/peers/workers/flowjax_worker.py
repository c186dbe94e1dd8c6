"""flowjax."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import paramax
from flowjax.bijections import Affine, RationalQuadraticSpline
from flowjax.distributions import Normal, Transformed
from flowjax.flows import masked_autoregressive_flow
from flowjax.train.loops import fit_to_data, fit_to_key_based_loss
from flowjax.train.losses import ElboLoss, MaximumLikelihoodLoss
from flowjax.train.train_utils import count_fruitless, get_batches, step, train_val_split
from protocol import TRAIN, Clock, jax_task, moons_data, serve, train_rows, train_target

#: Epochs after which a fit of two moons that has not reached the bar is given up.
MAX_EPOCHS = 200


def build(task, size):
    flow = masked_autoregressive_flow(
        jr.key(0),
        base_dist=Normal(jnp.zeros(size["event_size"])),
        flow_layers=size["layers"],
        nn_width=size["hidden"][0],
        nn_depth=len(size["hidden"]),
        nn_activation=getattr(jax.nn, size["activation"]),
        invert=task.startswith("maf"),
    )
    is_leaf = lambda leaf: isinstance(leaf, paramax.NonTrainable)  # noqa: E731
    params, static = eqx.partition(flow, eqx.is_inexact_array, is_leaf=is_leaf)

    def log_prob(params, x):
        return paramax.unwrap(eqx.combine(params, static)).log_prob(x)

    def sample(params, key):
        return paramax.unwrap(eqx.combine(params, static)).sample(key, (size["batch"],))

    return jax_task(task, size, params, log_prob, sample)


def moons(request):
    """The loop of `flowjax.train.fit_to_data`, with a look at the test set after each epoch."""
    x, test = moons_data()
    scores, bar = [], request["bar"]
    test_nll = eqx.filter_jit(lambda params, static: -eqx.combine(params, static).log_prob(test))
    clock = Clock()
    key, flow_key, split_key = jr.split(jr.key(request["seed"]), 3)
    flow = masked_autoregressive_flow(
        flow_key,
        base_dist=Normal(jnp.zeros(2)),
        transformer=RationalQuadraticSpline(knots=10, interval=4),
        flow_layers=5,
        nn_width=64,
    )
    is_leaf = lambda leaf: isinstance(leaf, paramax.NonTrainable)  # noqa: E731
    params, static = eqx.partition(flow, eqx.is_inexact_array, is_leaf=is_leaf)
    loss_fn, optimizer = MaximumLikelihoodLoss(), optax.adam(request["learning_rate"])
    opt_state = optimizer.init(params)
    train, validation = train_val_split(split_key, (jnp.asarray(x),), val_prop=0.1)
    losses, steps, reason = [], 0, "max_epochs"
    for _ in range(2 if request["quick"] else MAX_EPOCHS):
        key, *keys = jr.split(key, 3)
        train = [jr.permutation(keys[0], array) for array in train]
        validation = [jr.permutation(keys[1], array) for array in validation]
        for batch in zip(*get_batches(train, 256), strict=True):
            key, step_key = jr.split(key)
            params, opt_state, _ = step(
                params,
                static,
                *batch,
                optimizer=optimizer,
                opt_state=opt_state,
                loss_fn=loss_fn,
                key=step_key,
            )
            steps += 1
        values = []
        for batch in zip(*get_batches(validation, 256), strict=True):
            key, loss_key = jr.split(key)
            values.append(eqx.filter_jit(loss_fn)(params, static, *batch, key=loss_key))
        losses.append((sum(values) / len(values)).item())
        jax.block_until_ready(params)
        with clock:
            scores.append(float(test_nll(params, static).mean()))
        if scores[-1] <= bar:
            reason = "bar"
            break
        if count_fruitless(losses) > 15:
            reason = "patience"
            break
    return {
        "seconds": clock.seconds(),
        "reached": scores[-1] <= bar,
        "test_nll": scores[-1],
        "best_test_nll": min(scores),
        "steps": steps,
        "stop_reason": reason,
    }


def train(what, steps):
    if what == "density":
        rows = jnp.asarray(train_rows())
        flow = masked_autoregressive_flow(
            jr.key(0),
            base_dist=Normal(jnp.zeros(TRAIN["event_size"])),
            flow_layers=TRAIN["layers"],
            nn_width=TRAIN["width"],
        )
        per_epoch = int(0.9 * len(rows)) // TRAIN["batch"]
        optimizer = optax.adam(TRAIN["rate"])
        loss_fn = MaximumLikelihoodLoss()

        def fit():
            fit_to_data(
                jr.key(0),
                flow,
                rows,
                loss_fn=loss_fn,
                optimizer=optimizer,
                max_epochs=steps // per_epoch,
                max_patience=10**9,
                batch_size=TRAIN["batch"],
            )

        return fit
    size = TRAIN["posterior_size"]
    flow = Transformed(Normal(jnp.zeros(size)), Affine(jnp.zeros(size), jnp.ones(size)))
    loss_fn, optimizer = ElboLoss(train_target, TRAIN["draws"]), optax.adam(TRAIN["rate"])
    return lambda: fit_to_key_based_loss(
        jr.key(0), flow, loss_fn=loss_fn, steps=steps, optimizer=optimizer
    )


def density(x, context, seed):
    """The flow of its tutorials and the defaults of `fit_to_data`."""
    flow_key, fit_key = jr.split(jr.key(seed))
    flow = masked_autoregressive_flow(
        flow_key,
        base_dist=Normal(jnp.zeros(x.shape[1])),
        transformer=RationalQuadraticSpline(knots=8, interval=4),
        cond_dim=None if context is None else context.shape[1],
    )
    data = jnp.asarray(x) if context is None else (jnp.asarray(x), jnp.asarray(context))
    flow, _ = fit_to_data(fit_key, flow, data, show_progress=False)
    return eqx.filter_jit(lambda x, c: flow.log_prob(x, c))


if __name__ == "__main__":
    serve(["flowjax", "jax", "jaxlib", "equinox"], build, moons, train, density)
