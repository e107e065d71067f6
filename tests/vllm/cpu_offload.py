"""vLLM's own TieringOffloadingSpec with a worker for CPU caches, which vLLM's refuses: copies by the book."""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any

from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class CopyWorker(OffloadingWorker):
    """Copies at once, in the calling thread."""

    def __init__(self, caches: Any, region: SharedOffloadRegion) -> None:
        self.caches, self.region = caches, region
        self.chunks = [region.create_next_worker_view(t.page_size_bytes) for t in caches.tensors]
        self.done: list[TransferResult] = []

    def _copy(self, job: int, blocks: Any, chunks: Any, store: bool) -> bool:
        at = size = 0
        for count, refs in zip(blocks.group_sizes, self.caches.group_data_refs, strict=True):
            for block, chunk in zip(
                blocks.block_ids[at : at + count], chunks.block_ids[at : at + count], strict=True
            ):
                for ref in refs:
                    there = self.caches.tensors[ref.tensor_idx].tensor[int(block)].view(-1)
                    here = self.chunks[ref.tensor_idx][int(chunk)]
                    here.copy_(there) if store else there.copy_(here)
                    size += here.numel()
            at += count
        self.done.append(TransferResult(job, True, size, 1e-3))
        return True

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, src_spec, dst_spec, True)

    def submit_load(
        self, job_id: int, src_spec: Any, dst_spec: Any, expedited: bool = False
    ) -> bool:
        return self._copy(job_id, dst_spec, src_spec, False)

    def get_finished(self) -> list[TransferResult]:
        done, self.done = self.done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        pass

    def shutdown(self) -> None:
        self.chunks.clear()
        self.region.cleanup()


class CpuTieringSpec(TieringOffloadingSpec):
    """The same manager, scheduler and tiers."""

    def get_worker(self, kv_caches: Any) -> OffloadingWorker:
        region = SharedOffloadRegion(
            engine_id=self._engine_id,
            num_chunks=self.num_chunks,
            rank=self.config.parallel.rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        return CopyWorker(kv_caches, region)
