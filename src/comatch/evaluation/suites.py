"""The datasets of MMEB-V1 (36) and MMEB-V2 (78) by name, and the place of each in the published tables.

Names are those of the leaderboard's submission files. Source: specs/mmeb.md 1.3, 1.5 and 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from comatch.errors import EvaluationError


@dataclass(frozen=True)
class Place:
    """modality: image, video or visdoc; meta: the group within it; split: IND or OOD (seen in training or not), "" where nobody says."""

    modality: str
    meta: str
    split: str = ""

    @property
    def metric(self) -> str:
        """What counts: hit@1, for visual documents linear nDCG@5."""
        return "ndcg@5" if self.modality == "visdoc" else "hit@1"


_IMAGE = {
    ("CLS", "IND"): "ImageNet-1K N24News HatefulMemes VOC2007 SUN397",
    ("CLS", "OOD"): "Place365 ImageNet-A ImageNet-R ObjectNet Country211",
    ("VQA", "IND"): "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W",
    ("VQA", "OOD"): "ScienceQA VizWiz GQA TextVQA",
    ("RET", "IND"): "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA",
    ("RET", "OOD"): "FashionIQ Wiki-SS-NQ OVEN EDIS",
    ("VG", "IND"): "MSCOCO",
    ("VG", "OOD"): "RefCOCO RefCOCO-Matching Visual7W-Pointing",
}
_VIDEO = {
    "CLS": "K700 SmthSmthV2 HMDB51 UCF101 Breakfast",
    "QA": "MVBench Video-MME NExTQA EgoSchema ActivityNetQA",
    "RET": "DiDeMo MSR-VTT MSVD VATEX YouCook2",
    "MRET": "QVHighlight Charades-STA MomentSeeker",
}
_VISDOC = {
    "ViDoRe v1": "ViDoRe_arxivqa ViDoRe_docvqa ViDoRe_infovqa ViDoRe_tabfquad ViDoRe_tatdqa ViDoRe_shiftproject "
    "ViDoRe_syntheticDocQA_artificial_intelligence ViDoRe_syntheticDocQA_energy "
    "ViDoRe_syntheticDocQA_government_reports ViDoRe_syntheticDocQA_healthcare_industry",
    "ViDoRe v2": "ViDoRe_esg_reports_human_labeled_v2 ViDoRe_biomedical_lectures_v2_multilingual "
    "ViDoRe_economics_reports_v2_multilingual ViDoRe_esg_reports_v2_multilingual",
    "VisRAG": "VisRAG_ArxivQA VisRAG_ChartQA VisRAG_MP-DocVQA VisRAG_SlideVQA VisRAG_InfoVQA VisRAG_PlotQA",
    "OOD": "ViDoSeek-page ViDoSeek-doc MMLongBench-page MMLongBench-doc",
}

_V1 = {name: Place("image", meta, split) for (meta, split), names in _IMAGE.items() for name in names.split()}
_V2 = {
    **_V1,
    **{name: Place("video", meta) for meta, names in _VIDEO.items() for name in names.split()},
    **{name: Place("visdoc", meta) for meta, names in _VISDOC.items() for name in names.split()},
}
SUITES: Final[Mapping[str, Mapping[str, Place]]] = MappingProxyType({"mmeb-v1": MappingProxyType(_V1), "mmeb-v2": MappingProxyType(_V2)})


def places(suite: str) -> Mapping[str, Place]:
    """Every dataset of a suite with its place, in the order of the tables. Raises EvaluationError for another suite."""
    if suite not in SUITES:
        raise EvaluationError(f"suite {suite!r} has no published tables; allowed: {', '.join(SUITES)}")
    return SUITES[suite]
