"""The columns of degradation.csv."""

from resfuse.bench.trainings.training_row import sheet_of

ASKED = ("model", "data", "shortcut", "depth", "seed", "epochs", "batch_size", "learning_rate")
FOUND = (
    "param_count", "train_images", "test_images", "train_error_pct", "train_loss",
    "test_error_pct", "train_error_by_epoch_pct", "test_error_by_epoch_pct",
    "gradient_norm_by_layer",
)  # fmt: skip
SHEET = sheet_of("degradation.csv", ASKED, FOUND, "resfuse study degradation")
