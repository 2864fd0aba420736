"""A run as data: one YAML file, checked before any model loads."""

from comatch.config.ablate import AblateConfig as AblateConfig
from comatch.config.ablate import MeasureConfig as MeasureConfig
from comatch.config.data import DataConfig as DataConfig
from comatch.config.evaluate import EvaluateConfig as EvaluateConfig
from comatch.config.images import ImagesConfig as ImagesConfig
from comatch.config.loss import LossConfig as LossConfig
from comatch.config.reading import check_part as check_part
from comatch.config.reading import check_run as check_run
from comatch.config.reading import dump as dump
from comatch.config.reading import load_config as load_config
from comatch.config.reading import put as put
from comatch.config.reading import read_data as read_data
from comatch.config.reading import resolve as resolve
from comatch.config.schema import AdapterConfig as AdapterConfig
from comatch.config.schema import OptimConfig as OptimConfig
from comatch.config.schema import RunConfig as RunConfig
from comatch.config.schema import StageRun as StageRun
