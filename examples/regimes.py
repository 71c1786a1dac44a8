"""Regimes in two old series: the flow of the Nile, and the number of sunspots.

In a hidden Markov model each year is in one of a few regimes, each with its own level and scale, and EM finds
when the regimes change. It is not given the year 1899, from which on the Nile carried less (the dam at Aswan,
less rain), nor the sun's cycle of about eleven years.

Both series are short and in the public domain, so they are included in full. Of the sunspots the square root
is modelled, whose variance does not grow with its level.

Source of the Nile's flow: Cobb (1978), *The problem of the Nile*, Biometrika 65; of the sunspot numbers: the
yearly means of the National Geophysical Data Center, 1700 to 2008 (both as in statsmodels' data sets).
"""

import argparse
from pathlib import Path

import torch

from pyroelbo import audit, fit_em, models
from pyroelbo.runs import fresh

NILE = """
    1120 1160 963 1210 1160 1160 813 1230 1370 1140 995 935 1110 994 1020 960 1180 799 958 1140 1100 1210
    1150 1250 1260 1220 1030 1100 774 840 874 694 940 833 701 916 692 1020 1050 969 831 726 456 824 702 1120
    1100 832 764 821 768 845 864 862 698 845 744 796 1040 759 781 865 845 944 984 897 822 1010 771 676 649
    846 812 742 801 1040 860 874 848 890 744 749 838 1050 918 986 797 923 975 815 1020 906 901 1170 912 746
    919 718 714 740
"""  # 10^8 cubic metres a year at Aswan, 1871 to 1970

SUNSPOTS = """
    5 11 16 23 36 58 29 20 10 8 3 0 0 2 11 27 47 63 60 39 28 26 22 11 21 40 78 122 103 73 47 35 11 5 16 34
    70 81 111 101 73 40 20 16 5 11 22 40 60 80.9 83.4 47.7 47.8 30.7 12.2 9.6 10.2 32.4 47.6 54 62.9 85.9
    61.2 45.1 36.4 20.9 11.4 37.8 69.8 106.1 100.8 81.6 66.5 34.8 30.6 7 19.8 92.5 154.4 125.9 84.8 68.1
    38.5 22.8 10.2 24.1 82.9 132 130.9 118.1 89.9 66.6 60 46.9 41 21.3 16 6.4 4.1 6.8 14.5 34 45 43.1 47.5
    42.2 28.1 10.1 8.1 2.5 0 1.4 5 12.2 13.9 35.4 45.8 41.1 30.1 23.9 15.6 6.6 4 1.8 8.5 16.6 36.3 49.6 64.2
    67 70.9 47.8 27.5 8.5 13.2 56.9 121.5 138.3 103.2 85.7 64.6 36.7 24.2 10.7 15 40.1 61.5 98.5 124.7 96.3
    66.6 64.5 54.1 39 20.6 6.7 4.3 22.7 54.8 93.8 95.8 77.2 59.1 44 47 30.5 16.3 7.3 37.6 74 139 111.2 101.6
    66.2 44.7 17 11.3 12.4 3.4 6 32.3 54.3 59.7 63.7 63.5 52.2 25.4 13.1 6.8 6.3 7.1 35.6 73 85.1 78 64 41.8
    26.2 26.7 12.1 9.5 2.7 5 24.4 42 63.5 53.8 62 48.5 43.9 18.6 5.7 3.6 1.4 9.6 47.4 57.1 103.9 80.6 63.6
    37.6 26.1 14.2 5.8 16.7 44.3 63.9 69 77.8 64.9 35.7 21.2 11.1 5.7 8.7 36.1 79.7 114.4 109.6 88.8 67.8
    47.5 30.6 16.3 9.6 33.2 92.6 151.6 136.3 134.7 83.9 69.4 31.5 13.9 4.4 38 141.7 190.2 184.8 159 112.3
    53.9 37.6 27.9 10.2 15.1 47 93.8 105.9 105.5 104.5 66.6 68.9 38 34.5 15.5 12.6 27.5 92.5 155.4 154.6
    140.4 115.9 66.6 45.9 17.9 13.4 29.4 100.2 157.6 142.6 145.7 94.3 54.6 29.9 17.5 8.6 21.5 64.3 93.3
    119.6 111 104 63.7 40.4 29.8 15.2 7.5 2.9
"""  # mean number in a year, 1700 to 2008

SERIES = {
    # first year, numbers, transformation and its inverse, states, axis label
    "nile": (1871, NILE, lambda v: v / 100, lambda v: v * 100, 2, "flow of the Nile, 10⁸ m³ a year"),
    "sunspots": (1700, SUNSPOTS, torch.sqrt, torch.square, 3, "sunspots, mean of a year"),
}
SHADES = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")


def learn(y, states, options):
    """The best of several runs of EM."""
    torch.manual_seed(options.seed)
    # A floor of the scales, relative to the series: the likelihood of a regime of one year is unbounded.
    pair = models.HMM(states, 1, "gaussian", floor=0.15)
    pair.initialize(y)
    fit_em(
        pair,
        y,
        epochs=options.num_epochs,
        tolerance=1e-4,
        restarts=options.restarts,
        seed=options.seed,
        progress=False,
    )
    return pair


def parameters(states):
    """Number of free parameters: initial state, transitions, levels and scales."""
    return states - 1 + states * (states - 1) + 2 * states


def draw(axis, first, values, levels, posterior, label):
    """The series, the level of each year's regime, and p(regime of each year | all years) as shading."""
    years = range(first, first + len(values))
    low, high = float(values.min()), float(values.max())
    order = levels.argsort().tolist()
    for rank, state in enumerate(order):
        # one strip per year, as opaque as the regime is probable
        for year, share in zip(years, posterior[:, state].tolist(), strict=True):
            if share > 0.02:
                axis.axvspan(
                    year - 0.5, year + 0.5, color=SHADES[rank % len(SHADES)], alpha=0.35 * share, lw=0
                )
        axis.plot(
            [], [], color=SHADES[rank % len(SHADES)], lw=6, alpha=0.35, label=f"regime at {levels[state]:.0f}"
        )
    axis.plot(years, values.numpy(), color="black", lw=0.9, marker=".", ms=3)
    axis.step(years, levels[posterior.argmax(1)].numpy(), where="mid", color="tab:red", lw=1.2)
    axis.set_xlim(first - 0.5, first + len(values) - 0.5)
    axis.set_ylim(low - 0.05 * (high - low), high + 0.25 * (high - low))
    axis.set_ylabel(label)
    axis.legend(loc="upper right", fontsize=8, ncols=3)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=200)
    parser.add_argument("--most", type=int, default=4, help="the largest number of regimes to compare")
    parser.add_argument("--restarts", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--out", type=Path, default=None, help="a new directory for the picture")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.num_epochs, options.restarts, options.most = 5, 1, 2
    out = options.out or fresh("runs/regimes")

    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    results = {}
    for axis, (name, (first, text, into, back, shown, label)) in zip(
        figure.subplots(2, 1), SERIES.items(), strict=True
    ):
        values = torch.tensor([float(v) for v in text.split()])
        y = into(values).view(1, -1, 1)  # one datum, a series of one number per year
        print(f"\n{name}, {len(values)} years: how many regimes?")
        print(f"{'regimes':>7} {'ln p(y)':>10} {'numbers':>8} {'BIC':>9}")
        for states in range(1, options.most + 1):
            tried = learn(y, states, options)
            with torch.no_grad():
                value = float(tried.log_evidence(y))
            # Schwarz's criterion, smaller is better: the maximum of the evidence favours larger models
            bic = -2 * value + parameters(states) * torch.tensor(len(values)).log()
            print(f"{states:>7} {value:>10.2f} {parameters(states):>8} {bic:>9.2f}")
            if states == min(shown, options.most):
                pair = tried
        with torch.no_grad():
            visits = pair.posterior(y).marginals.observation[0]
            levels = back(pair.generator.loc[:, 0])
            path = pair.posterior(y).mode[0].tolist()
        changes = [first + t for t in range(1, len(path)) if path[t] != path[t - 1]]
        some = ", ".join(map(str, changes[:12])) + (", …" if len(changes) > 12 else "")
        print(
            f"levels {', '.join(f'{v:.0f}' for v in sorted(levels.tolist()))}; {len(changes)} changes: {some}"
        )
        draw(axis, first, values, levels, visits, label)
        # The guide draws whole paths from the exact posterior, so ln w of every draw equals the evidence.
        print(result := audit(pair, y, particles=16))
        results[name] = result
    figure.axes[1].set_xlabel("year")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "regimes.png", dpi=120)
    print("picture:", out / "regimes.png")
    return results


if __name__ == "__main__":
    main()
