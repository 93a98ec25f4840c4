"""Training: a loop for any loss, its sharding, checkpoints, metrics, and the folder of a run."""

from .checkpoint import Checkpoints as Checkpoints
from .checkpoint import restore_parameters as restore_parameters
from .command_line import command_line as command_line
from .command_line import parse as parse
from .config import CheckpointConfig as CheckpointConfig
from .config import MeshConfig as MeshConfig
from .config import TrainConfig as TrainConfig
from .fit import FitResult as FitResult
from .fit import fit as fit
from .interrupt import Interrupted as Interrupted
from .losses import cross_entropy as cross_entropy
from .main import exit_codes as exit_codes
from .main import main as main
from .metrics import MetricsWriter as MetricsWriter
from .metrics import read_metrics as read_metrics
from .optimizer import make_optimizer as make_optimizer
from .paths import digest as digest
from .plots import draw_curves as draw_curves
from .progress import Progress as Progress
from .run import Run as Run
from .run import open_run as open_run
from .run import read_config as read_config
from .sharding import RULES as RULES
from .sharding import device_mesh as device_mesh
from .sharding import shardings as shardings
