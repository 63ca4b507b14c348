"""How much memory a training run needs, and how to train so that it fits."""

from lightning_qat.plan.advice import Plan, best_plan, describe, remedies
from lightning_qat.plan.memory import PARTS, Estimate, estimate
from lightning_qat.plan.recipe import read_recipe, recipe
from lightning_qat.plan.setting import OPTIMIZERS, PRECISIONS, STRATEGIES, TEACHERS, Setting, parse_memory
from lightning_qat.plan.shapes import SHAPES, Shape, read_shape
from lightning_qat.plan.speed import Speed, measure_speed

__all__ = [
    "OPTIMIZERS",
    "PARTS",
    "PRECISIONS",
    "SHAPES",
    "STRATEGIES",
    "TEACHERS",
    "Estimate",
    "Plan",
    "Setting",
    "Shape",
    "Speed",
    "best_plan",
    "describe",
    "estimate",
    "measure_speed",
    "parse_memory",
    "read_recipe",
    "read_shape",
    "recipe",
    "remedies",
]
