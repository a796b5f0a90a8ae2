"""
OmniLearned against the published way to compute: same weights, same jets, one run. Called by generation.py and
training.py; on its own it times the classifier:

    python benchmarks/omnilearned.py
    python benchmarks/omnilearned.py --scaling 128 1000

The published way: padding is computed and multiplied away, every jet is as wide as the widest slot, all pairs and all
neighbours of padding go through the networks, both orders of every pair. Attention is that of `torch.nn`.
"""

import argparse
import json
import statistics
import time

import numpy as np
import torch
from torch import nn

JETCLASS_MULTIPLICITY = (44.0, 18.0)  # mean and standard deviation of the number of constituents
SLOTS = 128
PUBLISHED_STEPS = 127


def jets(batch: int, slots: int, seed: int, full: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Particles (batch, slots, 4) and mask (batch, slots), with the multiplicity of JetClass or all slots filled."""
    generator = np.random.default_rng(seed)
    counts = generator.normal(*JETCLASS_MULTIPLICITY, batch).round().clip(5, slots).astype(int)
    if full:
        counts[:] = slots
    particles = generator.normal([0, 0, 1, 1.3], [0.25, 0.25, 1.2, 1.2], (batch, slots, 4))
    mask = np.arange(slots) < counts[:, None]
    return torch.from_numpy(particles * mask[..., None]).float(), torch.from_numpy(mask)


class PublishedWay(nn.Module):
    """The published forward passes, on the parameters of one of our models."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.config = model.config

    def attention(self, part, query, key, key_padding=None, bias=None):
        """`torch.nn.MultiheadAttention` without biases, batch first."""
        output, _ = nn.functional.multi_head_attention_forward(
            query.transpose(0, 1),
            key.transpose(0, 1),
            key.transpose(0, 1),
            self.config.hidden_size,
            self.config.num_attention_heads,
            part.qkv_proj.weight,
            None,
            None,
            None,
            False,
            0.0,
            part.o_proj.weight,
            None,
            training=self.training,
            key_padding_mask=key_padding,
            need_weights=False,
            attn_mask=bias,
        )
        return output.transpose(0, 1)

    def block(self, layer, x, mask, bias=None):
        key_padding = None if bias is not None else mask[..., 0] == 0
        normed = layer.norm1(x * mask)
        x = x + self.attention(layer.self_attn, normed, normed, key_padding, bias) * mask
        return x + layer.mlp(layer.norm2(x)) * mask

    @staticmethod
    def pairs(first, second, pair_mask):
        """ln m², ln ΔR, ln kt of particles (..., 4), times the mask (..., 1)."""
        delta_eta, delta_phi = first[..., 0] - second[..., 0], first[..., 1] - second[..., 1]
        pt, other_pt = first[..., 2].exp(), second[..., 2].exp()
        mass = 2 * pt * other_pt * (torch.cosh(delta_eta) - torch.cos(delta_phi))
        distance = delta_eta.square() + delta_phi.square()
        kt = torch.minimum(pt, other_pt) * distance.sqrt()
        features = [
            torch.where(mass > 0, mass, 1).log(),
            0.5 * torch.where(distance > 0, distance, 1).log(),
            torch.where(kt > 0, kt, 1).log(),
        ]
        return torch.stack(features, dim=-1) * pair_mask

    def local(self, part, x, mask):
        config = self.config
        coordinates = x[..., : config.num_coordinates] + 999.0 * (1 - mask)
        squares = coordinates.square().sum(dim=-1)
        distances = squares.unsqueeze(2) - 2 * coordinates @ coordinates.mT + squares.unsqueeze(1)
        index = (-distances).topk(config.num_neighbors + 1, dim=-1).indices[..., 1:]
        rows = torch.arange(len(x), device=x.device)[:, None, None]
        others, known = x[rows, index], mask[rows, index]
        center = x.unsqueeze(2)
        features = center - others
        if config.use_local_interaction:
            of_pairs = self.pairs(center, others, mask.unsqueeze(2) * known)
            features = torch.cat([features, of_pairs], dim=-1) * known
        num_neighbors = config.num_neighbors
        states = (part.mlp(features) * known).flatten(0, 1)
        known = known.flatten(0, 1)
        bias = torch.where((known * known.mT) > 0, 0.0, -1e9)
        bias = bias.repeat_interleave(config.num_attention_heads, dim=0)
        for layer in part.layers:
            states = self.block(layer, states, known, bias)
        states = states.view(*x.shape[:2], num_neighbors, -1) * known.view(*x.shape[:2], num_neighbors, 1)
        weight = (1e-9 + known.view(*x.shape[:2], num_neighbors, 1)).sum(dim=2)
        return states.sum(dim=2) / weight * mask

    def body(self, x, time=None, conditions=None):
        config, body = self.config, self.model.model
        mask = (x[..., 2:3] != 0).float()
        states = body.embed_particles(x) * mask + self.local(body.local_embedding, x, mask)
        prefix = [body.tokens.expand(len(x), -1, -1)]
        if time is not None:
            prefix.append(body.embed_time(time).unsqueeze(1))
        if conditions is not None:
            prefix.append(body.embed_conditions(conditions).unsqueeze(1))
        states = torch.cat([*prefix, states], dim=1)
        seen = (states[..., 2:3] != 0).float()
        bias = torch.where((seen * seen.mT) > 0, 0.0, -1e9)
        bias = bias.repeat_interleave(config.num_attention_heads, dim=0)
        if body.interaction is not None:
            pair_mask = mask.unsqueeze(2) * mask.unsqueeze(1)
            features = self.pairs(x.unsqueeze(2), x.unsqueeze(1), pair_mask)
            of_pairs = body.interaction.mlp(features) * pair_mask
            num_prefix = states.shape[1] - x.shape[1]
            bias[:, num_prefix:, num_prefix:] += of_pairs.permute(0, 3, 1, 2).flatten(0, 1)
        for layer in body.layers:
            states = self.block(layer, states, seen, bias)
        return body.norm(states) * seen

    def classify(self, x):
        head = self.model.classifier
        states = self.body(x)
        tokens, rest = states[:, : head.num_tokens], states[:, head.num_tokens :]
        padding = rest[..., 2] == 0
        for layer in head.layers:
            tokens = tokens + self.attention(layer.self_attn, tokens, rest, padding)
            tokens = tokens + layer.mlp(layer.norm(tokens))
        return head.out(head.mlp(tokens.flatten(1)))

    def velocity(self, x, time, labels, conditions):
        head = self.model.generator
        states = self.body(x, time, conditions)
        mask = (states[..., 2:3] != 0).float()
        num_prefix = states.shape[1] - x.shape[1]
        label = head.label_mlp(head.embed_labels(labels)).unsqueeze(1)
        states = torch.cat([label, states], dim=1)
        seen = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)
        for layer in head.layers:
            states = self.block(layer, states * seen, seen)
        mask = mask[:, num_prefix:]
        return head.out(head.mlp(states[:, num_prefix + 1 :]) * mask) * mask


def build(kind: str, **settings):
    from hepzoo.modeling import modeling_omnilearned
    from hepzoo.modeling.configuration_omnilearned import OmniLearnedConfig

    torch.manual_seed(0)
    return getattr(modeling_omnilearned, kind)(OmniLearnedConfig.from_paper_size("small", **settings))


def alternate(functions: dict, repeats: int) -> tuple[dict[str, float], dict]:
    """Median seconds of functions that are called in turn, after one call that is not timed, and their last results."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    results = {}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            begin = time.perf_counter()
            results[name] = function()
            if repeat > 0:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}, results


def peak_megabytes(function) -> float:
    """Largest amount of tensor memory that is allocated inside `function`, MiB."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    running = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            running += event.nbytes()
            peak = max(peak, running)
    return peak / 2**20


def benchmark_classifier(batch: int, repeats: int) -> dict:
    """Logits of jets with JetClass multiplicity, both interactions on."""
    model = build("OmniLearnedForSequenceClassification", num_labels=10).eval()
    particles, mask = jets(batch, SLOTS, seed=1)
    published = PublishedWay(model).eval()
    with torch.inference_mode():
        seconds, results = alternate(
            {
                "published": lambda: published.classify(particles),
                "ours": lambda: model(particles, attention_mask=mask).logits,
            },
            repeats,
        )
    torch.testing.assert_close(results["ours"], results["published"], rtol=1e-3, atol=1e-4)
    slow, fast = seconds["published"], seconds["ours"]
    print(
        f"classifier, {model.num_parameters():,} parameters, {batch} jets of {mask.sum(1).float().mean():.1f} "
        f"particles in {SLOTS} slots: published {batch / slow:.1f} jets/s, ours {batch / fast:.1f} jets/s, "
        f"ratio {slow / fast:.2f}"
    )
    return {"speedup": slow / fast, "baseline_per_s": batch / slow, "ours_per_s": batch / fast}


def benchmark_scaling(sizes: list[int], jets_per_particle: int = 1024, published_limit: int = 256):
    """Time and memory with the number of particles, all slots filled; the published way up to `published_limit`."""
    model = build("OmniLearnedForSequenceClassification", num_labels=10)
    print(f"{'particles':>10}{'jets':>6}{'pass':>10}{'published s':>13}{'MiB':>8}{'ours s':>9}{'MiB':>8}")
    for size in sizes:
        batch = max(1, jets_per_particle // size)
        particles, mask = jets(batch, size, seed=2, full=True)
        labels = torch.zeros(batch, dtype=torch.long)
        published = PublishedWay(model)
        for is_training in (False, True):
            model.train(is_training)
            published.train(is_training)

            def ours(is_training=is_training, particles=particles, mask=mask, labels=labels):
                with torch.set_grad_enabled(is_training):
                    output = model(particles, attention_mask=mask, labels=labels)
                    if is_training:
                        output.loss.backward()

            def theirs(is_training=is_training, particles=particles, labels=labels, published=published):
                with torch.set_grad_enabled(is_training):
                    logits = published.classify(particles)
                    if is_training:
                        nn.functional.cross_entropy(logits, labels).backward()

            functions = {"ours": ours, **({"published": theirs} if size <= published_limit else {})}
            seconds, _ = alternate(functions, 1)
            memory = {name: peak_megabytes(function) for name, function in functions.items()}
            model.zero_grad()
            cells = [
                f"{seconds[name]:.2f}".rjust(width) + f"{memory[name]:.0f}".rjust(8)
                if name in seconds
                else "-".rjust(width + 8)
                for name, width in (("published", 13), ("ours", 9))
            ]
            print(f"{size:>10}{batch:>6}{'training' if is_training else 'inference':>10}{''.join(cells)}")


def benchmark_generation(arguments: argparse.Namespace) -> dict:
    """
    Jets with the published sampler (midpoint, 127 steps), and ours also with the default number of steps. The network
    is that of the published JetNet generators. The published way is timed over `--points` steps, all of which cost the
    same, and multiplied.
    """
    from hepzoo.modeling.flow_sampling import midpoint_step

    batch = arguments.batches[-1]
    model = build(
        "OmniLearnedForGeneration",
        num_labels=5,
        num_conditions=3,
        use_interaction=False,
        use_local_interaction=False,
        use_time=True,
    ).eval()
    published = PublishedWay(model).eval()
    _, mask = jets(batch, SLOTS, seed=3)
    labels = torch.arange(batch) % 5
    conditions = torch.randn(batch, 3)
    start = model.noise((batch, SLOTS, 4)) * mask.unsqueeze(-1)
    total, points = PUBLISHED_STEPS, arguments.points
    default_steps = model.config.num_inference_steps
    times = model.sampling_times(points)

    def field(x, now):
        return published.velocity(x * mask.unsqueeze(-1), now.expand(batch), labels, conditions)

    def baseline():
        x = start
        for now, step in zip(times[:-1], times.diff()):
            x = midpoint_step(field, x, now, step)
        return x

    def ours(steps=total):
        return model.generate(
            attention_mask=mask, noise=start, labels=labels, conditions=conditions, num_inference_steps=steps
        ).particles

    with torch.inference_mode():
        torch.testing.assert_close(ours(points), baseline(), rtol=1e-2, atol=1e-2)
        begin = time.perf_counter()
        baseline()
        slow = (time.perf_counter() - begin) * total / points
        begin = time.perf_counter()
        ours()
        fast = time.perf_counter() - begin
        begin = time.perf_counter()
        ours(default_steps)
        fast_default = time.perf_counter() - begin
    print(
        f"OmniLearned generator, {model.num_parameters():,} parameters, {batch} jets of "
        f"{mask.sum(1).float().mean():.1f} particles, {total} midpoint steps (published way timed over {points}): "
        f"published {batch / slow:.3f} jets/s, ours {batch / fast:.3f} jets/s, ratio {slow / fast:.2f}; ours in "
        f"{default_steps} steps: {batch / fast_default:.3f} jets/s, ratio {slow / fast_default:.2f}"
    )
    result = {"speedup": slow / fast, "baseline_per_s": batch / slow, "ours_per_s": batch / fast}
    result |= {"default_steps": default_steps, "speedup_default_steps": slow / fast_default}
    return {"family": "omnilearned", **result, "batch": batch, "length": SLOTS}


def benchmark_training(arguments: argparse.Namespace) -> dict:
    """Forward, backward, clipping and Lion of the published top tagger, jets of JetClass multiplicity."""
    from hepzoo.training.lion import Lion

    batch = arguments.batch
    model = build("OmniLearnedForSequenceClassification", num_labels=2).train()
    published = PublishedWay(model).train()
    particles, mask = jets(batch, SLOTS, seed=4)
    labels = torch.arange(batch) % 2
    optimizer = Lion(model.parameters(), lr=1e-6)

    def step(loss_of):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    losses = {
        "published": lambda: nn.functional.cross_entropy(published.classify(particles), labels),
        "ours": lambda: model(particles, attention_mask=mask, labels=labels).loss,
    }
    functions = {name: (lambda loss_of=loss_of: step(loss_of)) for name, loss_of in losses.items()}
    seconds, results = alternate(functions, arguments.repeats)
    torch.testing.assert_close(results["ours"], results["published"], rtol=1e-2, atol=1e-2)
    memory = {name: peak_megabytes(function) for name, function in functions.items()}
    slow, fast = seconds["published"], seconds["ours"]
    print(
        f"OmniLearned classifier, {model.num_parameters():,} parameters, training step of {batch} jets of "
        f"{mask.sum(1).float().mean():.1f} particles: published {slow:.2f} s, {memory['published']:.0f} MiB; "
        f"ours {fast:.2f} s, {memory['ours']:.0f} MiB; ratio {slow / fast:.2f}"
    )
    result = {"speedup": slow / fast, "baseline_per_s": 1 / slow, "ours_per_s": 1 / fast}
    return {"family": "omnilearned", **result, "batch": batch, "length": SLOTS}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256, help="jets of the classifier (default 256)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each way, the median counts (default 3)")
    parser.add_argument("--scaling", type=int, nargs="*", help="also time and memory at these numbers of particles")
    arguments = parser.parse_args(argv)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    if arguments.scaling:
        benchmark_scaling(arguments.scaling)
    result = benchmark_classifier(arguments.batch, arguments.repeats)
    print(json.dumps({"family": "omnilearned", **result, "batch": arguments.batch, "length": SLOTS}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
