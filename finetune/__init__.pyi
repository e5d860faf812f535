from .lora import LoraOptions as LoraOptions
from .options import ComputeOptions as ComputeOptions
from .options import FinetuneOptions as FinetuneOptions
from .predict import predict_paths as predict_paths
from .report import make_report as make_report
from .report import write_report as write_report
from .run import finetune as finetune
from .run import resume as resume
