"""PANDA: a randomly started prompt learns from the labels and from a teacher (Zhong et al., TKDE 2024).

The teacher is a prompt that starts from the sources and is tuned on the target first; it is frozen then. The student's
loss is CE + λ·w·MSE(student's logits, teacher's logits), w how well the sources are predicted to transfer: here
max(0, cosine of the mean shifts of the feature that the sources' prompt and an early target prompt cause).
Several sources become one by their mean before the teacher is tuned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from hgprompt.encoder import encode
from hgprompt.errors import OptionError
from hgprompt.tuning.config import TuneConfig
from hgprompt.tuning.method import Cost, Method, Prepared, Setting
from hgprompt.tuning.methods.start import early_prompt, per_seed, prompt_size, random_start, sources
from hgprompt.tuning.prompts import Penalty, PromptLearner
from hgprompt.tuning.trainer import train

_BATCH = 64


class Student(PromptLearner):
    """Prompts that have teachers.

    Args:
        teacher: tuned; run r is the teacher of run r. strengths: λ·w of each run. The rest: as for PromptLearner.
    """

    def __init__(
        self,
        teacher: PromptLearner,
        strengths: Sequence[float],
        parameters: Sequence[dict[str, Tensor]],
        configs: Sequence[TuneConfig],
    ) -> None:
        super().__init__(teacher.backbone, parameters, configs)
        self.teacher = teacher
        self.strengths = torch.tensor(strengths, device=teacher.backbone.device)

    def penalty(self, inputs: Tensor) -> Penalty:
        with torch.no_grad():
            taught = self.teacher.logits(inputs)

        def distance(logits: Tensor, runs: slice, images: slice) -> Tensor:
            return distillation(logits, taught[runs, images], self.strengths[runs])

        return distance


def distillation(student: Tensor, teacher: Tensor, strengths: Tensor) -> Tensor:
    """λ·w·MSE, [R], summed over images, of logits [R, B, C] and strengths [R]."""
    return strengths * (student - teacher).square().mean(2).sum(1)


def transferability(setting: Setting, source: Tensor, target: Tensor) -> float:
    """max(0, cosine of the mean shifts of the feature over the training images), of two prompts."""
    vit = setting.backbone
    both = torch.stack([source, target.to(source)])
    shifts = torch.zeros(2, vit.width, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        for images, _ in setting.train.batches(_BATCH):
            shifts += (encode(vit, both, images).double() - vit(images).double()).sum(1).cpu()
    return max(0.0, float(cosine_similarity(shifts[0], shifts[1], dim=0)))


class PANDA(Method):
    """The teacher is tuned as long as the student, at the student's rates; its work is the method's Cost.

    Args:
        lam: λ ∈ {0.01, 0.1, 1} in the paper. epochs: of the early target prompt.
    """

    name = "PANDA"
    kind = "prompt"
    uses_pool = True

    def __init__(self, lam: float = 0.1, epochs: int = 2) -> None:
        if not lam >= 0 or epochs < 1:
            raise OptionError(f"PANDA takes lam of at least 0 and epochs of at least 1, got {lam} and {epochs}")
        self.lam, self.epochs = lam, epochs

    def prepare(self, setting: Setting, configs: Sequence[TuneConfig]) -> Prepared:
        vit, images = setting.backbone, len(setting.train)
        mean = sources(setting).stack().mean(0)

        def predict(seed: int) -> tuple[float, Cost, dict[str, object]]:
            early, cost = early_prompt(setting, seed, self.epochs)
            w = transferability(setting, mean, early)
            return w, cost + Cost(forward=3 * images), {"transferability": w}

        predicted, cost, report = per_seed(configs, predict)
        teacher = PromptLearner.of(vit, [mean] * len(configs), setting.num_classes, configs)
        train(teacher, configs, setting.train, num_classes=setting.num_classes)
        starts = [random_start(setting, config.seed) for config in configs]
        students = PromptLearner.start(vit, starts, setting.num_classes, configs)
        work = len(configs) * configs[0].epochs * images
        # The teacher is tuned, and answers once more for every image that the student sees.
        cost += Cost(forward=work, backward=work)
        return Prepared(Student(teacher, [self.lam * w for w in predicted], students, configs), cost, report)

    def num_parameters(self, setting: Setting) -> int:
        """The student's prompt; the teacher is not kept."""
        return prompt_size(setting)
