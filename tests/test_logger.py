"""What a run shows is what it did: sample grids, TensorBoard."""

import numpy as np
import pytest
import tiny
import torch

import datasets
import train
from lib import logger, samples
from utils import UserError


def test_sample_grid_is_of_the_named_generators(dataroot, tmp_path):
    """Columns x, G(x), G(G(x)) each way, in eval mode; the networks are then as they were."""
    args = train.parse_args(tiny.words(dataroot, tmp_path, "--dropout --ema 0"))
    model = train.CycleGAN(args, torch.device("cpu"))
    A, B = torch.rand(2, 3, 3, 24, 24) * 2 - 1
    columns = samples.generate(model, A, B)
    assert model.netG_A2B.training and model.netG_B2A.training
    A2B, B2A = model.netG_A2B.eval(), model.netG_B2A.eval()
    with torch.no_grad():
        expected = (A, A2B(A), B2A(A2B(A)), B, B2A(B), A2B(B2A(B)))
    titles = ["real A", "fake B", "recovered A", "real B", "fake A", "recovered B"]
    assert list(columns) == titles
    for name, column, wanted in zip(titles, columns.values(), expected, strict=True):
        assert torch.allclose(column, wanted, atol=1e-6), name

    image, side = np.asarray(samples.draw(columns)), 144  # 24 pixels, six times as large
    assert image.shape == (16 + 3 * (side + 4) + 4, 6 * (side + 4) + 4, 3)
    for row in range(3):
        for column in range(6):
            top, left = 16 + 4 + row * (side + 4), 4 + column * (side + 4)
            cell = image[top : top + side : 6, left : left + side : 6]
            assert (cell == datasets.to_array(columns[titles[column]][row])).all(), (row, column)


def test_samples_are_of_the_averages_where_there_are_any(dataroot, tmp_path):
    args = train.parse_args(tiny.words(dataroot, tmp_path))
    model = train.CycleGAN(args, torch.device("cpu"))
    torch.nn.init.zeros_(model.averages["netG_A2B"].model[-2].weight)  # whose output is then 0
    A, B = torch.rand(2, 1, 3, 24, 24)
    columns = samples.generate(model, A, B)
    assert not columns["fake B"].any() and columns["fake A"].any()


def test_grids_show_what_was_changed(dataroot, tmp_path):
    args = train.parse_args(tiny.words(dataroot, tmp_path, "--keep_source --ema 0"))
    model = train.CycleGAN(args, torch.device("cpu"))
    model.netG_A2B.model[-2].bias.data[3] = -40  # its mask is zero: nothing is changed
    columns = samples.generate(model, *torch.rand(2, 2, 3, 24, 24))
    assert list(columns)[:4] == ["real A", "fake B", "change of A", "recovered A"]
    assert columns["change of A"].eq(-1).all()
    wanted = (columns["fake A"] - columns["real B"]).abs().mean(1, keepdim=True)
    assert torch.allclose(columns["change of B"], 2 * wanted - 1) and wanted.max() > 0.01
    assert samples.draw(columns).width == 8 * 148 + 4


def test_tensorboard_has_the_rows_of_the_csv(dataroot, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = tiny.words(dataroot, tmp_path, "--n_epochs 1 --log_every 2")
    assert train.main(train.parse_args([w for w in words if w != "--no_tensorboard"])) == 0
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    log = logger.read_csv(tmp_path / "logs" / "losses.csv")
    assert log["iteration"] == [2, 4, 5]
    for name in (*train.LOSSES, "lr"):
        scalars = events.Scalars(f"losses/{name}")
        assert [scalar.step for scalar in scalars] == log["iteration"]
        assert [scalar.value for scalar in scalars] == pytest.approx(log[name], rel=1e-5)
    assert [image.step for image in events.Images("samples")] == [5]


def test_errors_of_the_writer_thread(dataroot, tmp_path, capsys):
    """They end the run; they do not take the place of an error that has ended it, and are shown."""
    pytest.importorskip("tensorboard")
    words = [w for w in tiny.words(dataroot, tmp_path) if w != "--no_tensorboard"]
    args = train.parse_args(words)
    (tmp_path / "logs").mkdir()

    def fail():
        raise UserError("the disk is full")

    with pytest.raises(UserError, match="the disk is full"), logger.Logger(args, 0, 0, 9) as log:
        log.thread.submit(fail)
    assert log.thread.pool._shutdown and log.board.file_writer is None  # both are closed
    with pytest.raises(UserError, match="diverged"), logger.Logger(args, 0, 0, 9) as log:
        log.board.close = lambda: fail_to_write()
        log.thread.submit(fail)
        raise UserError("diverged")
    told = capsys.readouterr().err
    assert "error: the disk is full" in told and "is incomplete ([Errno 28]" in told


def fail_to_write():
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "words, epochs",
    [
        ("--sample_every 10 --n_epochs 5", ("002", "004", "005")),  # of five iterations each
        ("--sample_every 4 --n_epochs 2", ("001", "002")),
    ],
)
def test_short_epochs_share_a_grid(words, epochs, dataroot, tmp_path):
    assert tiny.run(dataroot, tmp_path, words) == 0
    names = {path.name for path in (tmp_path / "images").iterdir()}
    assert names == {"latest.png", *(f"epoch_{epoch}.png" for epoch in epochs)}
