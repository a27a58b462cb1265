"""A plugin with a target on which nothing is measured: files have sizes everywhere."""

from secateurs import hookimpl


class SizesOnly:
    """Implements `secateurs.interfaces.Target`."""

    def check(self, settings):
        """Refuse nothing."""

    def measure(self, baseline, candidate, settings, **_):
        """Return figures that say where, and nothing else."""
        from secateurs.interfaces import Measurement
        from secateurs.report import TargetFigures, TargetRatios

        figures = TargetFigures(provider=settings.provider, threads=settings.threads, batch_size=settings.batch_size)
        return Measurement(figures, figures.model_copy(), TargetRatios())


@hookimpl
def secateurs_register_targets(register):
    """Register the target."""
    register("SizesOnly", "secateurs_sizes:SizesOnly", summary="measures nothing")
