"""`torch-frame demo`, as a user runs it."""

import subprocess
import sys


def run_cli(*words: str, cwd) -> subprocess.CompletedProcess[str]:
    code = "import sys; from torch_frame.cli.main import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *words], cwd=cwd, capture_output=True, text=True, check=False)


def test_demo_reaches_its_goal_and_a_killed_run_ends_with_the_same_weights(tmp_path):
    result = run_cli("demo", "--epochs", "8", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "equal to the last bit" in result.stdout
    whole, killed = tmp_path / "demo_runs/demo_1/whole", tmp_path / "demo_runs/demo_1/killed"
    for run in (whole, killed):
        assert (run / "checkpoints/latest.pth").exists()
        assert (run / "checkpoints/best.pth").exists()
        assert list((run / "tb_logs").iterdir())
    assert (tmp_path / "demo_runs/demo_1/curves.png").stat().st_size > 1000
    assert "Training begins at epoch 1 of 8" in (killed / "log.txt").read_text()
    begun = (killed / "log.txt").read_text().count("Training begins at epoch")
    assert begun == 2, "the killed run was not resumed"


def test_version_and_unknown_commands(tmp_path):
    assert run_cli("--version", cwd=tmp_path).stdout.startswith("torch-frame 2.")
    assert run_cli("no-such-command", cwd=tmp_path).returncode == 2
