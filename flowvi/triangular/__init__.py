r"""The inverse of an autoregressive map at the price of one pass, and its derivatives.

The problem
    A masked network turns x of D coordinates into theta(x), and a scalar map t gives
    y_k = t(x_k; theta_k), where theta_k sees x_1..x_{k-1} only. Given y, find x. The usual way runs
    the whole network D times, because theta_k is known only when x_{k-1} is.

The solve
    Hidden units are sorted by degree, the number of coordinates that they may see. As soon as
    x_1..x_k are known, exactly the units of degree k become computable, in every layer, and they
    never change again. So walk k = 0..D-1, and in each step compute

        a_l[units of degree k] = rows of W_l^T h_{l-1} + b_l,   h_l = phi(a_l)      l = 1..L
        o_k                    = rows of W_o^T h_L + b_o
        x_k                    = t^{-1}(y_k; o_k)

    from what is already there: forward substitution for a triangular system that is not linear.
    Every row of every weight matrix is used once, so all D steps together cost one pass.

    The coordinates are cut into a few groups. At the start of a group one product per layer
    collects what all earlier groups contribute to its units, which skips the zero half of the
    weights; the steps inside of the group then work on its own block, which stays in cache. Buffers
    are feature-major, [units, n], so that the rows of a step are contiguous.

The derivatives
    The state s = (a_1..a_L, o, x) of the walk solves F(s; weights, y) = 0, with

        F = (a_1 - W_1^T x - b_1,
             a_l - W_l^T phi(a_{l-1}) - b_l,
             o - W_o^T phi(a_L) - b_o,
             t(x; o) - y).

    By the implicit function theorem its tangent ds solves a linear system A ds = r, where
    A = dF/ds at the solution and r = -(tangent of F at fixed s):

        da_1 - W_1^T dx                       = dW_1^T x + db_1
        da_l - W_l^T (phi'(a_{l-1}) da_{l-1}) = dW_l^T h_{l-1} + db_l
        do   - W_o^T (phi'(a_L) da_L)         = dW_o^T h_L + db_o
        t_x dx + t_o . do                     = dy

    A is triangular in the order of the walk, so A ds = r is solved by the same walk with phi'(a_l)
    in the place of phi, and A^T lambda = g by the walk from x_D down to x_1:

        v_k                = (g_x + rows of W_1 lambda_1) / t_x
        lambda_o,k         = g_o - t_o v_k
        lambda_l[degree k] = g_l + phi'(a_l) (rows of W_{l+1} lambda_{l+1})

    `jax.custom_jvp` states the tangent and `jax.lax.custom_linear_solve` holds both walks. JAX
    differentiates r itself, so a weight gradient is one product h_{l-1} lambda_l^T, and derivatives
    of every order, in either mode and any nesting, come out of the same two walks.

The cost, for n rows and hidden layers of H units

    arithmetic   n (D H + (L - 1) H^2 + H D P) multiplications for the walk of a dense network and
                 about half of that for a grouped one; D passes cost D times the first number
    gradient     one walk up, one walk down, one product per weight matrix
    stored       the state, n (L H + D P + D) numbers, once: what a forward pass keeps for its
                 gradient. D passes keep D times as much.

The log-determinant is a function of o and x, and is left to ordinary differentiation. Of two hidden
layers of 8 D units, with 256 rows, an inverse costs 1.2 to 1.8 passes of a plain dense layer of
that size for D from 8 to 128, its gradient 1.2 to 1.6 gradients; D passes cost 3.6 passes at D = 8,
18 at 32 and 86 at 128 (`benchmarks/results/speed.md`).

Source: forward substitution in blocks, as in Golub, Van Loan, "Matrix Computations", 2013, section
3.1; the derivative is the implicit function theorem, as in Krantz, Parks, "The Implicit Function
Theorem", 2013.

Related work caches what a step has computed for the next one (Ramachandran et al., "Fast Generation
for Convolutional Autoregressive Models", 2017, arXiv 1704.06001), or solves for all coordinates at
once by fixed-point iterations (Song, Meng, Liao, Ermon, "Accelerating Feedforward Computation via
Parallel Nonlinear Equation Solving", 2021, arXiv 2002.03629). New here, as far as we know, is the
walk for masked networks, with its adjoint and derivatives of every order.
"""

from flowvi.triangular.solve import forward_with_score, inverse_and_log_det
from flowvi.triangular.tokens import Tokens, inverse_by_tokens

__all__ = ["Tokens", "forward_with_score", "inverse_and_log_det", "inverse_by_tokens"]
