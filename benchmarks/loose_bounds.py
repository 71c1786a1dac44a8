"""What does a loose bound do to what is learned? Two models that can be trained exactly, trained under
mean-field guides.

Where KL(q, posterior) is far from zero, the maximum of the ELBO is not that of ln p. Each row has the gap at
the end, the evidence lost against exact training on the same data, and how far a parameter went astray.

- pPCA: a diagonal Gaussian guide with its scale free, then held at numbers that are more and more wrong. The
  ELBO is maximized in closed form by L-BFGS.
- HMM: a mean-field guide, q(z) = Π_t q(z_t), the best one for each sequence by coordinate ascent, against the
  exact posterior; both by EM from the true parameters, over emissions that overlap more and more.

Usage: python benchmarks/loose_bounds.py [--data 400] [--epochs 150] [--out runs/loose_bounds.png]
"""

import argparse
import json
import math
import platform
from pathlib import Path

import torch
import torch.nn.functional as F

from pyroelbo import evidence, fit_em, models

STAY = 0.9


def ppca_elbo(pair, y):
    """The mean ELBO of pPCA under its diagonal guide, in closed form."""
    g, encoder = pair.generator, pair.encoder
    mean, scale = encoder(y), encoder.log_scale.exp()
    error = (y - mean @ g.weight.T - g.loc).square().sum(-1) + (
        g.weight.square().sum(0) * scale.square()
    ).sum()
    fit = -0.5 * (
        pair.dims * math.log(2 * math.pi) + 2 * pair.dims * g.log_scale + error * (-2 * g.log_scale).exp()
    )
    kl = 0.5 * (mean.square() + scale.square() - 1 - 2 * scale.log()).sum(-1)
    return (fit - kl).mean()


def ppca_row(y, exact, scale):
    """pPCA trained under a guide of this scale (None: free)."""
    pair = models.PPCA(y.shape[-1], 2, guide="mean_field")
    pair.load_state_dict({**pair.state_dict(), **exact.state_dict()})
    with torch.no_grad():
        pair.encoder.log_scale.fill_(math.log(scale or 0.3))
    moving = [p for n, p in pair.named_parameters() if scale is None or n != "encoder.log_scale"]
    optimizer = torch.optim.LBFGS(
        moving, max_iter=3000, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = -ppca_elbo(pair, y)
        loss.backward()
        return loss

    optimizer.step(closure)
    elbo = float(ppca_elbo(pair, y).detach())
    sampled = evidence.elbo(pair, y, 64)
    assert abs(sampled.mean - elbo) < 5 * sampled.mean_error, "the closed form and the library disagree"
    value = evidence.exact(pair, y).mean
    return {
        "guide": "free" if scale is None else f"scale {scale}",
        "gap": value - elbo,
        "lost": evidence.exact(exact, y).mean - value,
        "noise": float(pair.generator.log_scale.detach().exp()),
        "error": abs(float((pair.generator.log_scale - exact.generator.log_scale).detach())),
    }


class MeanField(models.HMM):
    """An HMM whose E-step is the best mean-field guide, started where the last one ended: no step lowers the
    ELBO.
    """

    shares = None

    def e_step(self, y, lengths=None, hard=False):
        local = self.generator.distribution().log_prob(y[..., None, :])
        move, first = self.prior.transition.log_softmax(-1), self.prior.initial.log_softmax(-1)
        local = torch.cat([local[:, :1] + first, local[:, 1:]], 1)
        q = self.posterior(y).expected_parts()[1][2] if self.shares is None else self.shares
        q = q.clone()
        for _ in range(100):
            before = q.clone()
            # Steps of one parity do not touch each other: each half is updated at once.
            for parity in (0, 1):
                past = F.pad(q[:, :-1] @ move, (0, 0, 1, 0))
                future = F.pad(q[:, 1:] @ move.T, (0, 0, 0, 1))
                q[:, parity::2] = (local + past + future)[:, parity::2].softmax(-1)
            if float((q - before).abs().max()) < 1e-9:
                break
        self.shares = q
        pairs = torch.einsum("bti,btj->bij", q[:, :-1], q[:, 1:])
        elbo = (q * local).sum((1, 2)) + (pairs * move).sum((1, 2)) + torch.special.entr(q).sum((1, 2))
        flat = self.generator.statistics(q.flatten(0, 1), y.flatten(0, 1))
        return elbo, {"initial": q[:, 0].sum(0), "transition": pairs.sum(0), **flat}


def hmm_at_truth(kind, separation):
    pair = kind(2, 1, "gaussian", steps=50)
    with torch.no_grad():
        pair.prior.initial.zero_()
        pair.prior.transition.copy_(torch.tensor([[STAY, 1 - STAY], [1 - STAY, STAY]]).log())
        pair.generator.loc.copy_(torch.tensor([[-separation / 2], [separation / 2]]))
        pair.generator.log_scale.fill_(math.log(1 - pair.generator.floor))
    return pair


def learned(pair):
    """P(stay), the distance between the states' means, and their scale."""
    stay = pair.prior.transition.softmax(-1).diagonal().mean()
    return [
        float(x.detach()) for x in (stay, pair.generator.loc.diff(dim=0).sum(), pair.generator.scale.mean())
    ]


def hmm_row(separation, count, epochs):
    torch.manual_seed(0)
    _, y = hmm_at_truth(models.HMM, separation).simulate(count)
    exact, loose = hmm_at_truth(models.HMM, separation), hmm_at_truth(MeanField, separation)
    for pair in (exact, loose):
        fit_em(pair, y, epochs=epochs, tolerance=1e-7, progress=False)
    elbo = float(loose.e_step(y)[0].mean())
    value = evidence.exact(loose, y).mean
    return {
        "separation": separation,
        "gap": value - elbo,
        "lost": evidence.exact(exact, y).mean - value,
        "exact": learned(exact),
        "loose": learned(loose),
        "error": math.dist(learned(loose), learned(exact)),
    }


def figure(ppca, hmm, path):
    from matplotlib.figure import Figure

    page = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = page.subplots(1, 2)
    for axis, rows, label, title in (
        (left, ppca, "|ln σ - ln σ of exact training|", "pPCA, a guide of the wrong scale"),
        (right, hmm, "distance of (P(stay), means' distance, scale)", "HMM, a mean-field guide"),
    ):
        axis.plot([r["gap"] for r in rows], [r["error"] for r in rows], "o-", label=label)
        axis.plot(
            [r["gap"] for r in rows], [r["lost"] for r in rows], "s--", label="evidence lost, nats per datum"
        )
        axis.set(xlabel="gap at the end of training, nats per datum", title=title)
        axis.set_yscale("symlog", linthresh=1e-3)
        axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.savefig(path, dpi=130)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path("runs/loose_bounds.png"))
    options = parser.parse_args(arguments)
    torch.set_default_dtype(torch.float64)

    torch.manual_seed(0)
    truth = models.PPCA(6, 2)
    with torch.no_grad():
        truth.generator.log_scale.fill_(math.log(0.5))
    _, y = truth.simulate(options.data)
    exact = models.PPCA(6, 2).solve(y)
    ppca = [ppca_row(y, exact, s) for s in (None, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)]
    print(
        f"pPCA, {options.data} data: exact training ends at σ = "
        f"{float(exact.generator.log_scale.detach().exp()):.4f}"
    )
    print(f"{'guide':<10} {'gap':>8} {'lost':>8} {'σ':>8}")
    for r in ppca:
        print(f"{r['guide']:<10} {r['gap']:8.4f} {r['lost']:8.4f} {r['noise']:8.4f}")

    hmm = [hmm_row(s, options.data // 4, options.epochs) for s in (5.0, 4.0, 3.0, 2.5, 2.0, 1.5)]
    print(
        f"\nHMM of 2 states, {options.data // 4} sequences of 50 steps, P(stay) = {STAY}; gap and lost are "
        f"nats a sequence"
    )
    print(
        f"{'separation':<10} {'gap':>8} {'lost':>8}   P(stay), distance of the means, scale: mean-field | "
        f"exact EM"
    )
    for r in hmm:
        loose, best = (", ".join(f"{x:.3f}" for x in r[k]) for k in ("loose", "exact"))
        print(f"{r['separation']:<10} {r['gap']:8.4f} {r['lost']:8.4f}   {loose} | {best}")
    figure(ppca[1:], hmm, options.out)
    print(f"\npicture: {options.out}")
    print(json.dumps({"torch": torch.__version__, "machine": platform.machine(), "ppca": ppca, "hmm": hmm}))
    return ppca, hmm


if __name__ == "__main__":
    main()
