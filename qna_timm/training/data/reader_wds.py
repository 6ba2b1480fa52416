"""timm's reader of webdataset archives, with each sample read once where it is evaluated."""

import logging
from collections.abc import Iterator
from typing import Any

from timm.data.readers.class_map import remap_target
from timm.data.readers.reader_wds import ReaderWds, WdsTargetKeyError, log_and_continue

from qna_timm.training.data.bad_images import one_line
from qna_timm.training.errors import RunFailed
from qna_timm.training.generators import derive_seed

_logger = logging.getLogger(__name__)

_MOST_WARNINGS = 10


class ArchiveReader(ReaderWds):
    """Reads the archives of a split, shared out over processes and workers.

    In evaluation every archive is read once, to its end; timm's reader gives all processes as many
    samples, so that some are read twice and others never. In training the order of an epoch is a
    function of (seed, epoch, process, worker), and a resumed run has that of a straight one;
    timm's depends on the epochs before. Samples and archives that cannot be read are left out and
    told, the first of them.

    Args:
        strict: Fail instead (--strict-data).
        kwargs: Of timm's reader.
    """

    def __init__(self, *, strict: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.strict = strict
        self._left_out = 0

    def _lazy_init(self) -> None:
        super()._lazy_init()
        for stage in self.ds.pipeline:
            options = getattr(stage, "kw", {})
            if options.get("handler") is log_and_continue:
                options["handler"] = self._leave_out

    def _leave_out(self, error: Exception) -> bool:
        """What webdataset asks about an error; True goes on with the next sample or archive."""
        if isinstance(error, (TypeError, WdsTargetKeyError)):
            raise error
        if self.strict:
            raise RunFailed(f"--strict-data: cannot read a sample: {one_line(error)}") from error
        self._left_out += 1
        if self._left_out <= _MOST_WARNINGS:
            last = "; others are not told" if self._left_out == _MOST_WARNINGS else ""
            _logger.warning("a sample or an archive is left out: %s%s", one_line(error), last)
        return True

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        self._lazy_init()  # learns which worker this is
        if self.is_training:
            self.worker_seed = derive_seed(
                "order", self.common_seed, self.epoch_count.value, self.global_worker_id
            )
            self._lazy_init()
            yield from super().__iter__()
            return
        for sample in self.ds:
            yield sample["image"], self.label(sample["target"])

    def label(self, target: Any) -> Any:
        """A sample's target by the class map, if there is one."""
        if not self.remap_class:
            return target
        names = self._source_names
        return remap_target(target, self.class_to_idx, names, dense=self.dense_target)

    def __len__(self) -> int:
        """Samples of this process: in evaluation about as many, by its archives."""
        if self.is_training:
            return super().__len__()
        return -(-self.num_samples // self.dist_num_replicas)
