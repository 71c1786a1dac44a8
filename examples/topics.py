"""Topics of Python's own documentation by latent Dirichlet allocation, with each document's exact ln p(y).

Documents are docstrings of the standard library (nothing is downloaded): about numbers, files, the network.
Each document has shares θ of three topics, and each of its words comes from one of them. An encoder guesses
θ, trained by the ELBO. With three topics ln p(y) is also known exactly, by a sum over how many words each
topic explains, so the audit shows what the guide loses.
"""

import argparse

import torch

from pyroelbo import audit, data, fit, models

SUBJECTS = ("numbers", "files", "the network")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=150)
    parser.add_argument("-b", "--batch-size", type=int, default=64)
    parser.add_argument("-lr", "--learning-rate", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    options = parser.parse_args(arguments)
    epochs, num_data = (2, 5) if options.smoke else (options.num_epochs, 60)

    documents = data.load("docstrings")
    train, test = documents["train"], documents["test"][:num_data]
    subjects = documents.labels["test"][:num_data]
    print(f"{len(train)} docstrings, {documents.levels} words, at most {documents.steps} a document")

    torch.manual_seed(options.seed)
    pair = models.LDA(documents.levels, 3, documents.steps, concentration=0.1)
    fit(
        pair,
        train,
        epochs=epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
    )
    shares = pair.posterior(test).mean.detach()
    for k, topic in enumerate(pair.log_topics.detach()):
        words = ", ".join(documents.names[i] for i in topic.topk(8).indices)
        mean = [float(shares[subjects == label, k].mean()) for label in range(len(SUBJECTS))]
        told = ", ".join(f"{s} {v:.2f}" for s, v in zip(SUBJECTS, mean, strict=True))
        print(f"topic {k}: {words}\n  its share in documents about {told}")
    results = audit(pair, test, particles=64)
    print(results)
    return results


if __name__ == "__main__":
    main()
