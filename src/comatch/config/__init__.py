"""A run as data: one YAML file, checked before any model loads."""

from comatch.config.reading import dump as dump
from comatch.config.reading import load_config as load_config
from comatch.config.reading import resolve as resolve
from comatch.config.schema import AdapterConfig as AdapterConfig
from comatch.config.schema import DataConfig as DataConfig
from comatch.config.schema import ImagesConfig as ImagesConfig
from comatch.config.schema import OptimConfig as OptimConfig
from comatch.config.schema import RunConfig as RunConfig
from comatch.config.schema import StageRun as StageRun
