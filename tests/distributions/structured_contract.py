"""What every structured distribution must do: a class of tests to inherit.

A subclass is parametrized by ``case``, a name; ``make(case, seed)`` builds its distribution, with batch shape
``[B]``, B > 1, few enough structures to list, and log potentials that are leaves; ``listing(q, b)``
enumerates datum b by ``oracles``. Names that contain "sparse" have -inf among their potentials.
"""

import copy
import math
import pickle
import re

import pyro
import pytest
import torch

from pyroelbo.distributions import StructuredDistribution

# a right sampler fails the goodness-of-fit test with this probability, at each case; with DRAWS draws an
# error of 0.02 in the probability of any one structure adds 64 or more to its statistic
FALSE_ALARM = 1e-6
DRAWS = 40_000


def chi_square_p_value(counts, expected):
    """P(χ² at least as large) for cells of at least five expected, the rest in one."""
    small = expected < 5
    if small.any():
        counts = torch.cat([counts[~small], counts[small].sum(0, keepdim=True)])
        expected = torch.cat([expected[~small], expected[small].sum(0, keepdim=True)])
    if len(expected) < 2:
        return 1.0
    statistic = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2), statistic / 2).item()


def leaves(q):
    return [x for x in q.potentials if x.is_leaf and x.requires_grad]


class StructuredContract:
    def make(self, case, seed=0) -> StructuredDistribution:
        raise NotImplementedError

    def listing(self, q, b):
        raise NotImplementedError

    def lists(self, q):
        return [self.listing(q, b) for b in range(q.batch_shape[0])]

    def construct(self, q, potentials):
        """q again, through its constructor, with other potentials."""
        raise NotImplementedError

    @pytest.fixture
    def q(self, case):
        return self.make(case)

    def test_log_partition(self, q):
        expected = torch.tensor([one.log_partition for one in self.lists(q)])
        torch.testing.assert_close(q.log_partition, expected, rtol=0, atol=1e-10)

    def test_fast_and_generic_agree(self, q):
        generic = StructuredDistribution._log_partition(q, q.potentials)
        torch.testing.assert_close(q.log_partition, generic, rtol=0, atol=1e-10)
        ours = torch.autograd.grad(
            q.log_partition.sum(), leaves(q), allow_unused=True, materialize_grads=True
        )
        theirs = torch.autograd.grad(generic.sum(), leaves(q), allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)

    def test_marginals(self, q):
        marginals = q.marginals
        for name, found in zip(marginals._fields, marginals, strict=True):
            for b, one in enumerate(self.lists(q)):
                expected = torch.zeros_like(found[b])
                for index, value in one.marginals().get(name, {}).items():
                    expected[index] = value
                torch.testing.assert_close(found[b], expected, rtol=0, atol=1e-10)

    def test_marginals_without_gradient_are_the_same(self, q):
        with torch.no_grad():
            plain = q.marginals
        for x, y in zip(plain, q.marginals, strict=True):
            assert not x.requires_grad
            torch.testing.assert_close(x, y.detach(), rtol=0, atol=1e-12)

    def test_log_prob_of_every_structure(self, q):
        for b, one in enumerate(self.lists(q)):
            values = torch.tensor([labels for labels, _, _ in one.items])
            shape = (len(values), *q.event_shape)
            z = q.mode.expand(len(values), *q.batch_shape, *q.event_shape).clone()
            z[:, b] = values.reshape(shape)
            expected = torch.tensor([one.log_prob.get(labels, -math.inf) for labels, _, _ in one.items])
            torch.testing.assert_close(q.log_prob(z)[:, b], expected, rtol=0, atol=1e-10)

    def test_parts_and_labels_are_inverse(self, q):
        z = q.sample((50,))
        parts = q.to_parts(z)
        assert torch.equal(q.from_parts(parts), z)
        assert all(
            part.shape[1:] == q.batch_shape + x.shape[1:] for part, x in zip(parts, q.potentials, strict=True)
        )

    def test_mode(self, q):
        for b, one in enumerate(self.lists(q)):
            labels = tuple(q.mode[b].flatten().tolist())
            assert one.log_prob[labels] == pytest.approx(one.best(1)[0][1], abs=1e-10)

    def test_topk(self, q):
        k = 5
        z, log_prob = q.topk(k)
        assert z.shape == (k, *q.batch_shape, *q.event_shape)
        for b, one in enumerate(self.lists(q)):
            best = one.best(k)
            expected = torch.tensor([w for _, w in best] + [-math.inf] * (k - len(best)))
            torch.testing.assert_close(log_prob[:, b], expected, rtol=0, atol=1e-10)
            found = [tuple(z[i, b].flatten().tolist()) for i in range(len(best))]
            assert len(set(found)) == len(best)
            for labels, (_, w) in zip(found, best, strict=True):
                assert one.log_prob[labels] == pytest.approx(w, abs=1e-10)

    def test_topk_is_differentiable(self, q):
        z, log_prob = q.topk(3)
        found = log_prob > -math.inf
        options = {"allow_unused": True, "materialize_grads": True}
        ours = torch.autograd.grad(log_prob[found].sum(), leaves(q), retain_graph=True, **options)
        z = torch.where(found.reshape(found.shape + (1,) * len(q.event_shape)), z, q.mode)
        theirs = q.log_prob(z)[found].sum()
        torch.testing.assert_close(
            ours, torch.autograd.grad(theirs, leaves(q), **options), rtol=0, atol=1e-10
        )
        with torch.no_grad():
            assert not q.topk(1)[1].requires_grad
        for k in (0, -1, 2.0):
            with pytest.raises(ValueError, match=f"k: expected a positive integer, got {k}"):
                q.topk(k)

    def test_entropy(self, q):
        expected = torch.tensor([one.entropy() for one in self.lists(q)])
        torch.testing.assert_close(q.entropy(), expected, rtol=0, atol=1e-10)

    def test_cross_entropy_and_divergence(self, case, q):
        other = self.make(case, seed=1)
        pairs = list(zip(self.lists(q), self.lists(other), strict=True))
        cross = torch.tensor([p.cross_entropy(r) for p, r in pairs])
        torch.testing.assert_close(q.cross_entropy(other), cross, rtol=0, atol=1e-10)
        divergence = torch.tensor([p.cross_entropy(r) - p.entropy() for p, r in pairs])
        torch.testing.assert_close(
            torch.distributions.kl_divergence(q, other), divergence, rtol=0, atol=1e-10
        )
        torch.testing.assert_close(q.kl_divergence(q), torch.zeros(q.batch_shape), rtol=0, atol=1e-12)

    def test_samples_fit(self, q):
        draws = q.sample((DRAWS,))
        assert draws.dtype == torch.long
        for b, one in enumerate(self.lists(q)):
            index = {labels: i for i, labels in enumerate(one.log_prob)}
            counts = torch.zeros(len(index))
            values, times = draws[:, b].flatten(1).unique(dim=0, return_counts=True)
            for labels, n in zip(values.tolist(), times.tolist(), strict=True):
                counts[index[tuple(labels)]] += n  # a KeyError is a draw of probability zero
            expected = torch.tensor([math.exp(w) for w in one.log_prob.values()]) * DRAWS
            assert chi_square_p_value(counts, expected) > FALSE_ALARM

    def test_generic_samples_fit_too(self, q):
        with torch.no_grad():
            draws = StructuredDistribution._draw(q, torch.Size((DRAWS // 4,)))
        found = [part.mean(0) for part in q.to_parts(draws)]
        for mean, expected in zip(found, q.marginals, strict=True):
            # counts lie in [0, T]; Hoeffding's bound at the declared rate
            if not expected.numel():
                continue
            spread = max(1.0, float(q.event_shape[0]))
            bound = spread * math.sqrt(math.log(2 * expected.numel() / FALSE_ALARM) / (2 * (DRAWS // 4)))
            assert (mean - expected).abs().max() < bound

    def test_derivatives(self, case, q):
        if "sparse" in case:
            return
        names = [i for i, x in enumerate(q.potentials) if x.is_leaf and x.requires_grad and x.numel()]

        def rebuild(*tensors):
            potentials = list(q.potentials)
            for i, x in zip(names, tensors, strict=True):
                potentials[i] = x
            return self.construct(q, q._like(potentials))

        inputs = tuple(q.potentials[i] for i in names)
        assert torch.autograd.gradcheck(lambda *x: rebuild(*x).log_partition, inputs, fast_mode=True)
        assert torch.autograd.gradcheck(lambda *x: rebuild(*x).entropy(), inputs, fast_mode=True)
        assert torch.autograd.gradcheck(lambda *x: tuple(rebuild(*x).marginals), inputs, fast_mode=True)

    def test_gradients_are_finite(self, q):
        other = self.construct(q, q._like(x.detach() + 0.1 for x in q.potentials))
        for answer in (q.log_partition, q.entropy(), q.kl_divergence(other), q.log_prob(q.mode)):
            assert answer.isfinite().all()
            for g in torch.autograd.grad(answer.sum(), leaves(q), allow_unused=True, retain_graph=True):
                assert g is None or g.isfinite().all()

    def test_impossible(self, q):
        first = torch.zeros(q.batch_shape[0], dtype=torch.bool)
        first[0] = True

        def forbid(x):
            x = x.detach().expand(q.batch_shape + x.shape[1:]).clone()
            x[first] = -math.inf
            return x.requires_grad_()

        hard = self.construct(q, q._like(forbid(x) for x in q.potentials))
        assert hard.log_partition[0] == -math.inf
        torch.testing.assert_close(hard.log_partition[1:], q.log_partition[1:], rtol=0, atol=1e-12)
        for part, before in zip(hard.marginals, q.marginals, strict=True):
            assert not part[0].any()
            torch.testing.assert_close(part[1:], before[1:], rtol=0, atol=1e-12)
        assert hard.entropy()[0] == 0
        _, expected = q.expected_parts(hard=True)
        for part, before, x in zip(hard.expected_parts(hard=True)[1], expected, q.potentials, strict=True):
            if len(x) > 1 and len(part) > 1:
                assert not part[0].any()
                assert torch.equal(part[1:], before[1:])
        with pytest.raises(ValueError, match=r"no structure has positive probability at batch index \[0\]"):
            hard.sample()

    def test_weights_count_data(self, q):
        """Potentials that the batch shares get the counts of each datum as often as its weight says."""
        weights = torch.arange(len(q.log_partition))
        apart = self.construct(q, q._like(x.expand(q.batch_shape + x.shape[1:]) for x in q.potentials))
        for hard in (False, True):
            _, each = apart.expected_parts(hard=hard)
            _, found = q.expected_parts(hard=hard, weights=weights)
            for part, one, x in zip(found, each, q.potentials, strict=True):
                counted = one * weights.reshape(-1, *[1] * (one.dim() - 1))
                torch.testing.assert_close(part, counted.sum_to_size(x.shape), rtol=0, atol=1e-10)

    def test_an_empty_batch(self, q):
        if q.lengths is not None:
            return
        none = self.construct(
            q, q._like(x.detach().expand(q.batch_shape + x.shape[1:])[:0] for x in q.potentials)
        )
        assert none.log_partition.shape == none.entropy().shape == none.log_prob(none.mode).shape == (0,)
        assert none.kl_divergence(none).shape == (0,)
        assert none.sample((2,)).shape == none.topk(2)[0].shape == (2, 0, *q.event_shape)
        assert [len(x) for x in none.marginals] == [0] * len(q.potentials)

    def test_expand_and_mask(self, q):
        q.sample()  # what it keeps belongs to the old shape
        big = q.expand((3, *q.batch_shape))
        assert big.sample((2,)).shape == (2, 3, *q.batch_shape, *q.event_shape)
        torch.testing.assert_close(big.log_partition, q.log_partition.expand(3, -1))
        for found, part in zip(big.marginals, q.marginals, strict=True):
            torch.testing.assert_close(found, part.expand_as(found))
        z = q.sample()
        torch.testing.assert_close(big.log_prob(z), q.log_prob(z).expand(3, -1))
        keep = torch.arange(q.batch_shape[0]) > 0
        assert torch.equal(q.mask(keep).log_prob(z), torch.where(keep, q.log_prob(z), 0.0))

    def test_single_precision(self, q):
        small = self.construct(q, q._like(x.detach().float() for x in q.potentials))
        torch.testing.assert_close(small.log_partition.double(), q.log_partition, rtol=1e-5, atol=1e-5)
        for part, expected in zip(small.marginals, q.marginals, strict=True):
            assert part.dtype == torch.float32
            torch.testing.assert_close(part.double(), expected, rtol=1e-4, atol=1e-5)

    def test_site_under_plates(self, q):
        def model():
            with pyro.plate("draws", 3, dim=-2), pyro.plate("data", q.batch_shape[0], dim=-1):
                return pyro.sample("z", q)

        trace = pyro.poutine.trace(model).get_trace()
        trace.compute_log_prob()
        site = trace.nodes["z"]
        assert site["value"].shape == (3, *q.batch_shape, *q.event_shape)
        torch.testing.assert_close(site["log_prob"], q.log_prob(site["value"]))

    def test_copies_of_a_used_one(self, q):
        value = q.log_partition
        q.sample()
        fixed = self.construct(q, q._like(x.detach() for x in q.potentials))
        with torch.enable_grad():
            fixed.potentials[0].requires_grad_()
            assert fixed.log_partition.requires_grad
        for twin in (copy.deepcopy(fixed), pickle.loads(pickle.dumps(fixed))):
            torch.testing.assert_close(twin.log_partition, value, rtol=0, atol=1e-12)

    def test_labels_that_do_not_exist_are_refused(self, q):
        z = q.mode
        last = int(q.support.base_constraint.upper_bound)
        assert torch.equal(q.log_prob(z.int()), q.log_prob(z))
        with pytest.raises(ValueError, match=r"z: expected integers, got dtype torch.float64"):
            q.log_prob(z.double())
        z[1].view(-1)[0] = last + 1
        index = [1, *[0] * len(q.event_shape)]
        with pytest.raises(ValueError, match=re.escape(f"got {last + 1} at index {index}")):
            q.log_prob(z)

    def test_nan_is_refused(self, q):
        for i, name in enumerate(q.potentials._fields):
            broken = [x.detach().clone() for x in q.potentials]
            if not broken[i].numel():
                continue
            broken[i].view(-1)[-1] = math.nan
            with pytest.raises(
                ValueError, match=rf"{name}: expected finite numbers or -inf, got nan at index \["
            ):
                self.construct(q, broken)
