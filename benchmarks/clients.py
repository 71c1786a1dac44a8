"""Do packages that train with Pyro compile as they ship, and how much faster are their steps?

    python -m venv clients && clients/bin/pip install -e .[clients]
    clients/bin/python benchmarks/clients.py [--only NAME ...]

Every model is built by its package's own classes on the same synthetic counts (500 × 200), and is trained on
the batches of the package's own loader, with the loss and the optimizer of its own trainer. Ratios are
processor time of ``SVI.step`` as shipped by that of ``SVI.step`` with the two drop-ins, medians of
interleaved rounds, one thread. "differs" is the largest relative difference of the losses of ``--steps``
steps from equal seeds (a parameter whose gradient is only rounding, such as a bias before BatchNorm, moves
either way under Adam and changes no loss). Where steps stay eager, the reason is printed. A package that is
not installed is skipped.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal

from pyroelbo.compiled import CompiledELBO, FusedOptim

CELLS, GENES = 500, 200


class Client(NamedTuple):
    """What a package's trainer hands to SVI: ``batches`` are (args, kwargs)."""

    model: Any
    guide: Any
    batches: list[tuple[tuple, dict]]
    loss: Any
    adam: dict[str, Any]


def counts() -> np.ndarray:
    """Counts of five cell types, at least one a cell."""
    rng = np.random.default_rng(0)
    types_ = rng.gamma(0.5, 4.0, (5, GENES))[np.arange(CELLS) % 5]
    x = rng.poisson(types_ * rng.gamma(5.0, 0.2, (CELLS, 1)))
    x[:, 0] += 1
    return x.astype("float32")


def cells():
    import anndata
    import pandas as pd

    obs = pd.DataFrame(
        {"batch": np.arange(CELLS) % 2, "type": np.arange(CELLS) % 5},
        index=[f"c{i}" for i in range(CELLS)],
        dtype="category",
    )
    return anndata.AnnData(counts(), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(GENES)]))


def of_scvi(model: Any, batch: int, loss: Any, adam: dict[str, Any], extra: dict | None = None) -> Client:
    """The module of a scvi-tools model, as its training plan hands it to SVI."""
    module = model.module
    for part in (module, module.model, module.guide):
        if hasattr(part, "n_obs"):
            part.n_obs = CELLS
    loader = model._make_data_loader(adata=model.adata, batch_size=batch)
    batches = [module._get_fn_args_from_batch(tensors) for tensors in loader]
    return Client(module.model, module.guide, [(a, k | (extra or {})) for a, k in batches], loss, adam)


def regression() -> Client:
    RegressionModel = of_cell2location().RegressionModel
    data = cells()
    RegressionModel.setup_anndata(data, batch_key="batch", labels_key="type")
    return of_scvi(RegressionModel(data), 2500, Trace_ELBO(), {"lr": 0.002})


def cell2location() -> Client:
    import pandas as pd

    Cell2location = of_cell2location().Cell2location
    data = cells()
    kinds = np.stack([data.X[np.arange(CELLS) % 5 == k].mean(0) for k in range(5)], 1) + 0.01
    Cell2location.setup_anndata(data, batch_key="batch")
    model = Cell2location(data, pd.DataFrame(kinds, index=data.var_names), N_cells_per_location=8)
    return of_scvi(model, CELLS, Trace_ELBO(), {"lr": 0.002})


def lda() -> Client:
    from scvi.model import AmortizedLDA

    data = cells()
    AmortizedLDA.setup_anndata(data)
    return of_scvi(AmortizedLDA(data), 125, Trace_ELBO(), {"lr": 1e-3}, {"kl_weight": 1.0})


def decipher() -> Client:
    from scvi.external import Decipher

    data = cells()
    Decipher.setup_anndata(data)
    return of_scvi(Decipher(data), 125, Trace_ELBO(), {"lr": 5e-3, "weight_decay": 1e-4})


def resolvi(**options: Any) -> Client:
    from scvi.external import RESOLVI

    data = cells()
    data.obsm["X_spatial"] = np.random.default_rng(1).normal(size=(CELLS, 2))
    RESOLVI.setup_anndata(data, batch_key="batch")
    loss = Trace_ELBO(num_particles=5, vectorize_particles=True, retain_graph=True)
    return of_scvi(RESOLVI(data, **options), 512, loss, {"lr": 3e-3, "eps": 1e-4}, {"kl_weight": 1.0})


def pyroved() -> Any:
    """pyroved's models; it draws with torchvision alone, which not every build of torch has beside it."""
    wanted = ("torchvision", "torchvision.utils")
    try:
        importlib.import_module(wanted[1])
    except Exception:
        for name in wanted:
            sys.modules[name] = types.ModuleType(name)
        sys.modules[wanted[1]].make_grid = None  # type: ignore[attr-defined]
        models = importlib.import_module("pyroved.models")
        for name in wanted:
            del sys.modules[name]
        return models
    return importlib.import_module("pyroved.models")


def of_cell2location() -> Any:
    """cell2location's models; it imports a function that Pyro 1.9.1 has removed."""
    from pyro.infer.autoguide import utils

    if not hasattr(utils, "deep_getattr"):
        utils.deep_getattr = lambda thing, key: functools.reduce(getattr, key.split("."), thing)
    return importlib.import_module("cell2location.models")


def pictures() -> list[tuple[tuple, dict]]:
    x = torch.as_tensor(counts()).clamp(max=10) / 10
    return [((part,), {}) for part in x.split(100)]


def ivae(invariances: list[str] | None) -> Client:
    vae = pyroved().iVAE((GENES,), latent_dim=2, invariances=invariances)
    return Client(vae.model, vae.guide, pictures(), Trace_ELBO(), {"lr": 1e-3})


def jivae(invariances: list[str] | None) -> Client:
    vae = pyroved().jiVAE((GENES,), latent_dim=2, discrete_dim=3, invariances=invariances)
    guide = pyro.infer.config_enumerate(vae.guide, "parallel", expand=True)
    loss = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
    return Client(vae.model, guide, pictures(), loss, {"lr": 1e-3})


def chirho() -> Client:
    from chirho.counterfactual.handlers import MultiWorldCounterfactual
    from chirho.interventional.handlers import do
    from chirho.observational.handlers import condition

    x = torch.as_tensor(counts()[:, :3]).log1p()
    treated = (x[:, 1] > x[:, 2]).float()
    outcome = x[:, 0] + 0.5 * treated

    def causes(x, treated, outcome):
        weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            t = pyro.sample("t", dist.Bernoulli(logits=x @ weights))
            pyro.sample("y", dist.Normal(x @ weights + effect * t, scale))

    def model(x, treated, outcome):
        with (
            MultiWorldCounterfactual(first_available_dim=-2),
            do(actions={"t": torch.tensor(0.0)}),
            condition(data={"t": treated, "y": outcome}),
        ):
            causes(x, treated, outcome)

    observed = condition(causes, data={"t": treated, "y": outcome})
    guide = AutoNormal(pyro.poutine.block(observed, hide=["t", "y"]))
    return Client(model, guide, [((x, treated, outcome), {})], Trace_ELBO(), {"lr": 1e-2})


CLIENTS: dict[str, Callable[[], Client]] = {
    "cell2location, regression": regression,
    "cell2location, main model": cell2location,
    "scvi-tools AmortizedLDA": lda,
    "scvi-tools Decipher": decipher,
    "scvi-tools RESOLVI": resolvi,
    "scvi-tools RESOLVI, downsample_counts=False": lambda: resolvi(downsample_counts=False),
    "pyroved iVAE": lambda: ivae(None),
    "pyroved jiVAE": lambda: jivae(None),
    "pyroved iVAE, shifted": lambda: ivae(["t"]),
    "pyroved jiVAE, shifted": lambda: jivae(["t"]),
    "chirho, twin worlds": chirho,
}


class Run:
    """One training with a param store of its own."""

    def __init__(self, make: Callable[[], Client], drop_ins: bool, backend: str):
        self._store = copy.copy(pyro.get_param_store().get_state())
        with self.here():
            pyro.set_rng_seed(0)
            client = make()
            self.loss = CompiledELBO(client.loss, backend=backend) if drop_ins else client.loss
            adam = FusedOptim(torch.optim.Adam, client.adam) if drop_ins else pyro.optim.Adam(client.adam)
            self.svi = SVI(client.model, client.guide, adam, self.loss)
            self.batches, self.calls = client.batches, 0

    @contextmanager
    def here(self) -> Iterator[None]:
        with pyro.get_param_store().scope(self._store) as self._store:
            yield

    def step(self) -> float:
        args, kwargs = self.batches[self.calls % len(self.batches)]
        self.calls += 1
        return self.svi.step(*args, **kwargs)

    def losses(self, steps: int) -> torch.Tensor:
        """The losses of ``steps`` steps from a fixed seed."""
        with self.here():
            pyro.set_rng_seed(1)
            return torch.tensor([self.step() for _ in range(steps)], dtype=torch.float64)

    def time(self, steps: int) -> float:
        """Milliseconds of processor time a step."""
        with self.here():
            start = time.process_time()
            for _ in range(steps):
                self.step()
            return 1e3 * (time.process_time() - start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=[""], help="parts of the names of clients")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="time for one cell in one round")
    parser.add_argument("--steps", type=int, default=12, help="steps that are compared")
    parser.add_argument("--backend", default="inductor")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, Pyro {pyro.__version__}, one thread")
    print("| model | differs | SVI.step, ms | drop-ins, ms | ratio | seconds to build |")
    print("|---|---|---|---|---|---|")
    for name, make in CLIENTS.items():
        if not any(part in name for part in options.only):
            continue
        try:
            shipped, fast = (Run(make, drop_ins, options.backend) for drop_ins in (False, True))
        except ImportError as error:
            print(f"| {name} | skipped: {error} |", flush=True)
            continue
        expected, found = shipped.losses(options.steps), fast.losses(options.steps)
        gap = float(((found - expected) / expected).abs().max())
        counters = fast.loss.counters
        if counters.compiled_calls == 0:
            print(f"| {name} | stays eager: {'; '.join(counters.reasons)} |", flush=True)
            continue
        once = max(1e-3 * shipped.time(1), 1e-4)
        number = max(1, int(options.seconds / once))
        times = [(shipped.time(number), fast.time(number)) for _ in range(options.rounds)]
        slow, quick = (statistics.median(t[i] for t in times) for i in (0, 1))
        spent = counters.capture_time + counters.compile_time
        print(f"| {name} | {gap:.0e} | {slow:.2f} | {quick:.2f} | {slow / quick:.1f} | {spent:.0f} |")
        for reason in counters.reasons:
            print(f"    eager: {reason}", flush=True)


if __name__ == "__main__":
    main()
