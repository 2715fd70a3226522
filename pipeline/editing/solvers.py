"""Closed-form solvers of locate-then-edit: from keys and wanted changes to a change of the weight.

Every solver finds ΔW (O, I) so that ΔW k is close to r for the keys k and changes r of the requests, and small on
ordinary text, whose keys have the second moment C. Shapes: O outputs, I inputs of the projection, n columns. C is
(I, I), or the blocks of a diagonal (E, I / E, I / E) for experts, whose inputs lie one expert's behind another's.
All work is done in float64, in few matrices of (I, I): at 28,672 inputs each takes 6.6 GB.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.errors import UserError

UNUSED = 1e-8  # of the mean of C's diagonal
TEXT, SMALL = 0.03, 1e-6  # of text in `sparing`, and of its diagonal's mean
RIDGE = 1e-4  # added to the diagonals of matrices that are solved for alone, relative to their mean


def memit(key_In: Tensor, change_On: Tensor, moment_II: Tensor, strength: float) -> Tensor:
    """ΔW = R Kᵀ (λC + K Kᵀ)⁻¹ (MEMIT, arXiv 2210.07229): least squares on requests and text together.

    Args:
        key_In: keys of the requests.
        change_On: wanted changes of the outputs.
        moment_II: C = E[k kᵀ] over ordinary text.
        strength: λ without the keys' scale: λ = strength · mean ‖k‖² of requests / mean ‖k‖² of text.

    Inputs that text never uses (a ReLU's dead units) would make the system singular: C's diagonal gets a hair more.
    Where C is in blocks, which K Kᵀ is not, it is R (1 + Kᵀ (λC)⁻¹ K)⁻¹ Kᵀ (λC)⁻¹, the same, and C raised more.
    """
    K, R = key_In.double(), change_On.double()
    C = _ridged(moment_II, UNUSED if moment_II.dim() == 2 else RIDGE)
    C *= strength * (K.square().sum(0).mean() / trace(C)).item()
    if C.dim() == 2:
        return _solve(C.addmm_(K, K.T), K @ R.T).T
    CinvK = _solve(C, K)
    return R @ _solve(K.T @ CinvK + torch.eye(K.shape[1]).to(K), CinvK.T)


def emmet(key_In: Tensor, change_On: Tensor, moment_II: Tensor, ridge: float = RIDGE) -> Tensor:
    """ΔW = R (Kᵀ C⁻¹ K)⁻¹ Kᵀ C⁻¹ (EMMET, arXiv 2403.14236): ΔW K = R exactly, least change on text.

    `ridge`, relative to the mean of each diagonal, keeps both systems sound when keys nearly agree or text is
    short.
    """
    K, R = key_In.double(), change_On.double()
    CinvK = _solve(_ridged(moment_II, ridge), K)
    return R @ _solve(_ridged(K.T @ CinvK, ridge if K.shape[1] > 1 else 0.0), CinvK.T)


def rome(key_In: Tensor, change_On: Tensor, moment_II: Tensor, ridge: float = RIDGE) -> Tensor:
    """ROME (arXiv 2202.05262; the form that uses one key throughout, arXiv 2403.07175): requests one by one.

    Each is `emmet` with one column, given what those before it already change.
    """
    total = torch.zeros(len(change_On), len(key_In), dtype=torch.float64, device=key_In.device)
    for key_I1, change_O1 in zip(key_In.double().T[..., None], change_On.double().T[..., None], strict=True):
        total += emmet(key_I1, change_O1 - total @ key_I1, moment_II, ridge)
    return total


def alphaedit(key_In: Tensor, change_On: Tensor, moment_II: Tensor, threshold: float) -> Tensor:
    """ΔW = R Kᵀ P (K Kᵀ P + s·1)⁻¹ = R (Kᵀ P K + s·1)⁻¹ Kᵀ P (AlphaEdit, arXiv 2410.02355).

    P projects onto the directions in which ordinary text has next to no keys: C's eigenvectors with eigenvalues
    below `threshold` times the largest. s is a hundredth of the keys' mean squared norm inside them: the paper's 1
    has the keys' scale in it. Keys of earlier updates stand among the columns, with what they were given.

    Args:
        key_In, change_On, moment_II: as in `memit`.
        threshold: relative to C's largest eigenvalue.
    """
    K, R = key_In.double(), change_On.double()
    values, vectors = torch.linalg.eigh(moment_II.double())
    free = values < threshold * values.max()
    if not free.any():
        raise UserError(f"alphaedit: no direction is free of text; give an expert.threshold above {threshold}")
    P = (vectors * free.to(vectors)[..., None, :]) @ vectors.mT
    PK = (P @ K.view(*P.shape[:-1], -1)).view_as(K)
    s = 0.01 * PK.square().sum(0).mean()
    return R @ torch.linalg.solve(K.T @ PK + s * torch.eye(K.shape[1]).to(K), PK.T)


def sparing(taught_II: Tensor, others_II: Tensor, moment_II: Tensor, weight: float) -> Tensor:
    """M = T (T + λN + μC)⁻¹ (I, I): ΔW M does to taught keys what ΔW does, and little to others and to text's.

    It is the least squares solution: ΔW M k close to ΔW k for taught keys k, and close to nothing for the others.

    Args:
        taught_II, others_II: T and N, second moments of the keys of what was taught, and of what is to be spared.
        moment_II: C = E[k kᵀ] over ordinary text; μ is `TEXT` in units of T's scale.
        weight: λ.
    """
    text = TEXT * (trace(taught_II.double()) / trace(moment_II.double())).item()
    return _solve(  # no name holds the system, so that it is let go when it is factored
        _add_ridge(
            others_II.to(torch.float64, copy=True).mul_(weight).add_(taught_II).add_(moment_II, alpha=text), SMALL
        ),
        taught_II.double(),
    ).mT


def trace(matrix: Tensor) -> Tensor:
    """The sum of a matrix's diagonal, or of those of all blocks."""
    return matrix.diagonal(dim1=-2, dim2=-1).sum()


def _ridged(matrix: Tensor, ridge: float) -> Tensor:
    """The matrix, in float64, with `ridge` times its mean diagonal added on the diagonal."""
    return _add_ridge(matrix.to(torch.float64, copy=True), ridge)


def _add_ridge(matrix: Tensor, ridge: float) -> Tensor:
    """The same, in place."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    diagonal += ridge * diagonal.mean()
    return matrix


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solution of a symmetric positive definite system; UserError when it is singular."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    shape = matrix.shape[:-1]
    del matrix  # which is often as large as all else
    if failed.sum() or not factor.isfinite().all():
        raise UserError("edit: the closed-form system is singular; give a larger expert.strength, or more text")
    return torch.cholesky_solve(right.reshape(*shape, -1), factor).reshape(right.shape)
