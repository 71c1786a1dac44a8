"""A VAE of texts that collapses on request, and one that does not.

One Gaussian latent for a sentence, read by a recurrent encoder; a recurrent decoder writes the sentence word
by word. The decoder can write well without the latent, so plain training switches it off: KL(q(z|y), p(z))
goes to 0 and so does the information I_q(y; z) that the latent has of the sentence. A minimum rate in the
objective keeps it on. A rate alone proves nothing, so the information is measured, with its error, and what
the latent says is shown: walks between two sentences, written greedily.

Sentences are expressions of Python's standard library, token by token (nothing is downloaded). More remedies,
on English, side by side: `python -m benchmarks.collapse`, and docs/collapse.md.

    python examples/sentence_vae.py --num-epochs 60
"""

import argparse

import torch

from pyroelbo import audit, data, evidence, fit, models
from pyroelbo.objectives import Rate_ELBO
from pyroelbo.training.schedules import warmup


def spell(rows, names):
    return [" ".join(names[i] for i in row if i >= 0) for row in rows.tolist()]


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=60)
    parser.add_argument("-b", "--batch-size", type=int, default=64)
    parser.add_argument("-lr", "--learning-rate", type=float, default=2e-3)
    parser.add_argument("--rate", type=float, default=4.0, help="nats that the latent shall carry")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    options = parser.parse_args(arguments)
    found = data.load("expressions")
    train, test = found["train"], found["test"][:200]
    if options.smoke:
        options.num_epochs, train, test = 1, train[:100], test[:10]
    print(f"{len(train)} expressions of up to {found.steps} tokens, {found.levels} of them different")

    results = {}
    kept = {"objective": Rate_ELBO(options.rate), "kl_weight": warmup(options.num_epochs / 2)}
    for name, remedy in (("plain", {}), ("minimum rate, annealed", kept)):
        torch.manual_seed(options.seed)
        pair = models.SentenceVAE(found.steps, found.levels, latent=8, width=64, dropout=0.1)
        fit(
            pair,
            train,
            epochs=options.num_epochs,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            schedule="cosine",
            seed=options.seed,
            device="cuda" if options.cuda else None,
            progress=False,
            **remedy,
        )
        pair.cpu()
        print(f"\n{name}: what the latent carries")
        used = evidence.diagnostics(pair, test)
        print(used)
        if used.unit_kl is not None:  # KL(q(z_d|y), p(z_d)) is what each coordinate knows, and its hole
            rates = (used.unit_kl.value + used.unit_information.value).sort(descending=True).values
            print("KL by dimension:", " ".join(f"{x:.2f}" for x in rates))
        results[name] = audit(pair, test, particles=64)
        print(results[name])

        with torch.no_grad():
            ends = pair.encode(test[[0, len(test) // 2]]).mean
            steps = torch.linspace(0, 1, 5)[:, None]
            walk = spell(pair.observation(ends[:1] + steps * (ends[1:] - ends[:1])).greedy(), found.names)
        begin, end = spell(test[[0, len(test) // 2]], found.names)
        print(f"\nfrom  {begin}\n" + "\n".join(f"      {line}" for line in walk) + f"\nto    {end}")
    return results


if __name__ == "__main__":
    main()
