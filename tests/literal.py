"""The paper and the network taken literally: slow, obvious, independent of the package. References for the tests."""

from __future__ import annotations

import math

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer


def tiny_vit(seed: int = 0, **options) -> VisionTransformer:
    """A randomly initialised ViT small enough for float64 and gradcheck, with every affine part away from 1 and 0."""
    settings = {
        "img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 0
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomize(VisionTransformer(**(settings | options)))


def named_vit(name: str, seed: int = 0, **options) -> VisionTransformer:
    """A registered timm architecture with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomize(timm.create_model(name, pretrained=False, num_classes=0, **options))


def randomize(model: VisionTransformer) -> VisionTransformer:
    """Fresh inits have unit scales, zero biases and tiny tokens, which would hide a part that is left out."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                p.uniform_(0.5, 1.5)
            elif name.endswith("gamma"):
                p.uniform_(0.2, 1.0)
            elif p.ndim == 1:
                p.normal_(std=0.1)
            elif name in ("cls_token", "reg_token", "pos_embed"):
                p.normal_(std=0.5)
            elif p.ndim >= 2 and "patch_embed" not in name and p.shape[0] > 1:
                p.normal_(std=1.5 / p.shape[-1] ** 0.5)
    return model.eval()


def features(model: VisionTransformer, prompts: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Eq. 3 with timm's own modules, one prompt after the other: [CLS; P; E(x)] → [M, B, h]."""
    return torch.stack([_one_prompt(model, prompt, images) for prompt in prompts])


def _one_prompt(model: VisionTransformer, prompt: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    deep = prompt.ndim == 3
    n, p = model.num_prefix_tokens, prompt.shape[-2]
    x = model._pos_embed(model.patch_embed(images))
    first = (prompt[0] if deep else prompt).expand(len(x), -1, -1)
    x = model.norm_pre(torch.cat([x[:, :n], first, x[:, n:]], dim=1))
    for i, block in enumerate(model.blocks):
        if deep and i > 0:
            x = torch.cat([x[:, :n], prompt[i].expand(len(x), -1, -1), x[:, n + p :]], dim=1)
        x = block(x)
    x = torch.cat([x[:, :n], x[:, n + p :]], dim=1)  # prompts are never pooled
    return model.forward_head(model.norm(x), pre_logits=True)


def h_score(features: np.ndarray, labels: np.ndarray, intensity: float = 0.0) -> float:
    """Eq. 5 in float64, term by term; with an intensity, the covariance is shrunk towards a multiple of I."""
    f = np.asarray(features, dtype=np.float64)
    f = f - f.mean(0)
    n, h = f.shape
    sigma = f.T @ f / n
    between = np.zeros((h, h))
    for c in np.unique(labels):
        mean = f[labels == c].mean(0)
        between += (labels == c).mean() * np.outer(mean, mean)
    shrunk = (1 - intensity) * sigma + intensity * np.trace(sigma) / h * np.eye(h)
    inverse = np.linalg.inv(shrunk) if intensity > 0 else np.linalg.pinv(shrunk, hermitian=True, rcond=1e-11)
    return float((1 - intensity) * np.trace(inverse @ between))


def alignment_loss(gradients: np.ndarray, weights: np.ndarray) -> float:
    """Eqs. 8–10 term by term; gradients [M, ...]."""
    unit = [g / np.linalg.norm(g) for g in gradients.reshape(len(gradients), -1).astype(np.float64)]
    mixed = sum(w * g for w, g in zip(weights, unit, strict=True))
    mixed = mixed / np.linalg.norm(mixed)
    return float(np.mean([1 - g @ mixed for g in unit]))


def lda_logits(
    fit_features: torch.Tensor, fit_labels: torch.Tensor, features: torch.Tensor, intensity: float
) -> torch.Tensor:
    """Linear discriminant analysis fitted on one set and applied to another (float64); classes in ascending order."""
    fit_features, n = fit_features.double(), len(fit_features)
    centre = fit_features.mean(0)
    classes = fit_labels.unique()
    total = (fit_features - centre).T @ (fit_features - centre) / n
    means = torch.stack([fit_features[fit_labels == c].mean(0) - centre for c in classes])
    priors = torch.stack([(fit_labels == c).double().mean() for c in classes])
    within = total - (means.T * priors) @ means
    h = within.shape[0]
    within = (1 - intensity) * within + intensity * within.trace() / h * torch.eye(h, dtype=torch.float64)
    directions = torch.linalg.solve(within, means.T)
    return (features.double() - centre) @ directions - 0.5 * (means.T * directions).sum(0) + priors.log()


def temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The factor that minimises the cross-entropy of factor · logits, unless Laplace's rule has a smaller one."""
    from scipy.optimize import brentq, minimize_scalar  # the GPU benchmarks, which import this file, do without

    found = minimize_scalar(
        lambda t: float(F.cross_entropy(np.exp(t) * logits, labels)), bounds=(-9.2, 4.6), options={"xatol": 1e-12}
    )
    n = len(labels)

    def too_sure(t):
        return float((np.exp(t) * logits).softmax(1).max(1).values.mean()) - (n + 1) / (n + 2)

    if too_sure(found.x) > 0:
        return float(np.exp(brentq(too_sure, -27.0, found.x, xtol=1e-12)))
    return float(np.exp(found.x))


def tune(model, start, images, config, classes):
    """One tuning run, as in VPT's code: a prompt and a linear head, torch's optimiser, autograd throughout."""
    from hgprompt.tuning.streams import stream  # what is drawn is a convention, no formula

    generator = stream(config.seed, "head")
    bound = model.embed_dim**-0.5
    head = torch.nn.Linear(model.embed_dim, classes)
    with torch.no_grad():
        head.weight.copy_((torch.rand(head.weight.shape, generator=generator) * 2 - 1) * bound)
        head.bias.copy_((torch.rand(head.bias.shape, generator=generator) * 2 - 1) * bound)
    prompt = start.clone().requires_grad_()
    scale = config.batch_size / 256
    kind = torch.optim.SGD if config.optimizer == "sgd" else torch.optim.AdamW
    options = {"momentum": 0.9} if config.optimizer == "sgd" else {}
    groups = [
        {"params": [prompt], "lr": config.lr * scale},
        {"params": head.parameters(), "lr": config.head_lr * scale},
    ]
    optimizer = kind(groups, weight_decay=config.weight_decay, **options)
    steps = config.epochs * math.ceil(len(images) / config.batch_size)
    rising = int(config.warmup * steps)
    step, losses, dtype = 0, [], model.cls_token.dtype
    for epoch in range(config.epochs):
        order = torch.randperm(len(images), generator=stream(config.seed, "order", epoch))
        for chosen in order.split(config.batch_size):
            batch = ((images.images[chosen].float() / 255 - 0.5) / 0.5).to(dtype)
            feature = features(model, prompt[None].to(dtype), batch)[0].float()
            loss = F.cross_entropy(head(feature), images.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            up = (step + 1) / (rising + 1)
            down = 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))
            for group, base in zip(optimizer.param_groups, (config.lr, config.head_lr), strict=True):
                group["lr"] = base * scale * (up if step < rising else down)
            optimizer.step()
            losses.append(float(loss.detach()))
            step += 1
    return prompt.detach(), head, losses
