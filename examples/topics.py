"""Topics of Python's own documentation by latent Dirichlet allocation, with each document's exact ln p(y).

Documents are docstrings of the standard library (nothing is downloaded): about numbers, files, the network.
Each document has shares θ of three topics, and each of its words comes from one of them. An encoder guesses
θ, trained by the ELBO. With three topics ln p(y) is also known exactly, by a sum over how many words each
topic explains, so the audit shows what the guide loses.
"""

import argparse
import importlib
import inspect
import re
from collections import Counter

import torch

from pyroelbo import audit, fit, models

MODULES = {
    "numbers": ("math", "cmath", "statistics", "random", "fractions", "decimal"),
    "files": ("os", "shutil", "pathlib", "tempfile", "zipfile", "tarfile"),
    "network": ("socket", "http.client", "http.server", "ftplib", "smtplib", "urllib.request"),
}


def documents():
    """(words, subject) of every docstring of eight words or more, of four letters each or more."""
    for subject, names in MODULES.items():
        for name in names:
            module = importlib.import_module(name)
            owners = [module, *(c for _, c in inspect.getmembers(module, inspect.isclass))]
            for owner in owners:
                for _, member in inspect.getmembers(owner, callable):
                    text = inspect.getdoc(member) or ""
                    if getattr(member, "__module__", None) != name:
                        continue
                    words = re.findall(r"[a-z]{4,}", text.lower())
                    if len(words) >= 8:
                        yield tuple(words), subject


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=150)
    parser.add_argument("-b", "--batch-size", type=int, default=64)
    parser.add_argument("-lr", "--learning-rate", type=float, default=1e-2)
    parser.add_argument("--vocabulary", type=int, default=300, help="the commonest words")
    parser.add_argument("--longest", type=int, default=40, help="words of a document")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    options = parser.parse_args(arguments)
    epochs, num_data = (2, 5) if options.smoke else (options.num_epochs, 60)

    found = sorted(set(documents()))
    spread = Counter(w for words, _ in found for w in set(words))  # documents with this word
    total = Counter(w for words, _ in found for w in words if spread[w] < len(found) / 10)
    known = [w for w, _ in total.most_common(options.vocabulary)]
    number = {w: i for i, w in enumerate(known)}
    y = torch.full((len(found), options.longest), -1)
    for i, (words, _) in enumerate(found):
        kept = [number[w] for w in words if w in number][: options.longest]
        y[i, : len(kept)] = torch.tensor(kept, dtype=torch.long)
    subjects = [subject for _, subject in found]
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(options.seed))
    order = order[(y[order] >= 0).sum(-1) >= 5]
    test, train = order[:num_data], order[num_data:]
    print(f"{len(order)} docstrings, {len(known)} words, at most {options.longest} a document")

    torch.manual_seed(options.seed)
    pair = models.LDA(len(known), 3, options.longest, concentration=0.1)
    fit(
        pair,
        y[train],
        epochs=epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
    )
    shares = pair.posterior(y[test]).mean.detach()
    for k, topic in enumerate(pair.log_topics.detach()):
        words = ", ".join(known[i] for i in topic.topk(8).indices)
        mean = {s: float(shares[[subjects[i] == s for i in test.tolist()], k].mean()) for s in MODULES}
        told = ", ".join(f"{s} {v:.2f}" for s, v in mean.items())
        print(f"topic {k}: {words}\n  its share in documents about {told}")
    results = audit(pair, y[test], particles=64)
    print(results)
    return results


if __name__ == "__main__":
    main()
