"""The configuration: a typed schema that YAML and the command line meet once, at the edge (`nlray.config.loading`).

Inside the program only these frozen dataclasses travel. Nothing here imports torch or ray, so that a mistake is reported before
anything slow starts.
"""

from nlray.config.cms import LEVEL_FORMS, AutoscaleConfig, CmsConfig, InContextConfig, LevelConfig
from nlray.config.data import DataConfig, SourceConfig, StreamConfig
from nlray.config.model import AttentionConfig, ModelConfig
from nlray.config.optimizer import OPTIMIZERS, OptimizerConfig, ScheduleConfig
from nlray.config.run import Config, EvalConfig, RecoveryConfig, RunConfig
from nlray.config.titans import MEMORIES, TitansConfig
from nlray.config.workers import ExchangeConfig, RankResourcesConfig, ResourcesConfig, SequenceConfig

__all__ = [
    "LEVEL_FORMS",
    "MEMORIES",
    "OPTIMIZERS",
    "AttentionConfig",
    "AutoscaleConfig",
    "CmsConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "ExchangeConfig",
    "InContextConfig",
    "LevelConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RankResourcesConfig",
    "RecoveryConfig",
    "ResourcesConfig",
    "RunConfig",
    "ScheduleConfig",
    "SequenceConfig",
    "SourceConfig",
    "StreamConfig",
    "TitansConfig",
]
