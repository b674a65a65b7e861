"""Divergences between a teacher and its students, with their gradients in closed form.

Each takes the log-probabilities of one teacher, (n, 1, v), and of s students, (n, s, v), and
returns the divergence of every student, (n, s), and its gradient with respect to the students'
logits, (n, s, v). The teacher is a constant: no gradient is taken for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from depthmix.config import Divergence

_Teacher = Float[Tensor, "n 1 v"]
_Students = Float[Tensor, "n s v"]
_Result = tuple[Float[Tensor, "n s"], Float[Tensor, "n s v"]]


def kl(teacher: _Teacher, students: _Students) -> _Result:
    """KL(teacher || student); the gradient is q - p. The paper's choice."""
    p = teacher.exp()
    # Products with the teacher are matrix products: no (n, s, v) temporary is made.
    cross = torch.matmul(students, p.transpose(1, 2)).squeeze(2)
    negative_entropy = torch.matmul(teacher, p.transpose(1, 2)).squeeze(2)
    return negative_entropy - cross, students.exp().sub_(p)


def reverse_kl(teacher: _Teacher, students: _Students) -> _Result:
    """KL(student || teacher); the gradient is q (log q/p - KL)."""
    q = students.exp()
    log_ratio = students - teacher
    value = torch.linalg.vecdot(q, log_ratio)
    return value, log_ratio.sub_(value.unsqueeze(2)).mul_(q)


def js(teacher: _Teacher, students: _Students) -> _Result:
    """Jensen-Shannon; with m = (p + q) / 2 the gradient is q (log q/m - KL(q || m)) / 2."""
    mixture = torch.logaddexp(teacher, students).sub_(math.log(2))
    p, q = teacher.exp(), students.exp()
    student_ratio = students - mixture
    student_kl = torch.linalg.vecdot(q, student_ratio)
    teacher_kl = torch.linalg.vecdot(p, teacher - mixture)
    gradient = student_ratio.sub_(student_kl.unsqueeze(2)).mul_(q).mul_(0.5)
    return (teacher_kl + student_kl) / 2, gradient


DIVERGENCES: Mapping[Divergence, Callable[[_Teacher, _Students], _Result]] = MappingProxyType(
    {"kl": kl, "reverse_kl": reverse_kl, "js": js}
)
