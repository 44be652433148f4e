"""The columns of training.csv.

It is a file of its own: degradation.csv asks which network is trained and this how one is run, and
no page of either would have to leave out the other's rows.
"""

from resfuse.bench.trainings.training_row import sheet_of

ASKED = (
    "model", "way", "data", "shortcut", "depth", "seed", "epochs", "batch_size", "learning_rate",
)  # fmt: skip
FOUND = (
    "param_count", "train_images", "test_images", "train_error_pct", "train_loss",
    "test_error_pct", "test_loss", "train_error_by_epoch_pct", "test_error_by_epoch_pct",
    "train_loss_by_epoch", "test_loss_by_epoch", "loss_by_step",
)  # fmt: skip
SHEET = sheet_of("training.csv", ASKED, FOUND, "resfuse study training")
