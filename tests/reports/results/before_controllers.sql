BEGIN TRANSACTION;
CREATE TABLE farm_schema (
	version INTEGER NOT NULL, 
	PRIMARY KEY (version)
);
INSERT INTO "farm_schema" VALUES(1);
CREATE TABLE runs (
	id VARCHAR(100) NOT NULL, 
	sweep_id VARCHAR(100) NOT NULL, 
	cell TEXT NOT NULL, 
	block INTEGER NOT NULL, 
	device VARCHAR(200) NOT NULL, 
	container VARCHAR(200) NOT NULL, 
	strategy VARCHAR(200) NOT NULL, 
	workload VARCHAR(200) NOT NULL, 
	status VARCHAR(20) NOT NULL, 
	verdict VARCHAR(20) NOT NULL, 
	started_at VARCHAR(40) NOT NULL, 
	engine_sha256 VARCHAR(64) NOT NULL, 
	record TEXT NOT NULL, 
	PRIMARY KEY (id), 
	FOREIGN KEY(sweep_id) REFERENCES sweeps (id)
);
INSERT INTO "runs" VALUES('pi4b-emulated-edgemoe-0-0','20261123-221500-3f2a','pi4b-emulated/tiny-mixtral-int4/edgemoe/10-experts/dialogue/cold',0,'pi4b-emulated','tiny-mixtral-int4','edgemoe','dialogue','ok','valid','2026-11-23T22:15:14+00:00','e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1','{"v": 1, "id": "pi4b-emulated-edgemoe-0-0", "sweep_id": "20261123-221500-3f2a", "cell": {"device": "pi4b-emulated", "container": "tiny-mixtral-int4", "container_sha256": "c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0", "strategy": "edgemoe", "expert_budget": "10-experts", "workload": "dialogue", "workload_sha256": "d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0", "page_cache": "cold"}, "block": 0, "status": "ok", "verdict": "valid", "reasons": [], "request": {"run_id": "pi4b-emulated-edgemoe-0-0", "container": "edgemoe-farm/store/c0c0c0c0.moe", "strategy": "edgemoe", "prompts": [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28]], "max_new_tokens": 2, "expert_budget": null, "profile": null, "sampling": {"temperature": 0.0, "top_p": 1.0, "seed": 0}, "stop_at_eos": false, "warmups": 1, "repetitions": 1, "reader": "pread", "page_cache": "cold", "emulated_read_bytes_per_s": 43000000.0, "threads": 0, "backend": "auto", "deadline_s": 3600.0, "passages": []}, "facts": {"hostname": "pi4b-emulated", "machine": "aarch64", "kernel": "6.6.31+rpt-rpi-v8", "os": "Debian GNU/Linux 12 (bookworm)", "model": "Raspberry Pi 4 Model B Rev 1.5", "cpu": "Cortex-A72", "cores": 4, "memory_bytes": 8189000000, "page_bytes": 4096, "boot_id": "5f1c6f0e-7d6e-4f5a-9a53-0e6a2a1f4c11", "python": "3.11.2", "numpy": "1.24.2", "blas": null, "engine": "0.1.0"}, "load": {"load_s": 0.31, "non_expert_bytes": 23068672, "expert_bytes": 0, "expert_budget_bytes": 6000000, "container_bytes": 146800640, "container_experts": 192, "page_cache_resident_fraction": 0.004, "strategy": {"residency": "edgemoe", "eviction": "edgemoe"}, "reader": "pread", "backend": "numpy", "variant": null, "threads": null, "warnings": [], "notes": []}, "samples": [{"prompt": 0, "repetition": 0, "warmup": true, "tokens": [27670, 12623], "steps": {"time_s": [0.23416926465928872, 0.039270836947358966], "stall_s": [0.1680309655419236, 0.028220044566966918], "hits": [55, 10], "late": [9, 0], "misses": [8, 2], "read_bytes": [11400000, 2400000], "prefetched_bytes": [6600000, 1200000], "wasted_bytes": [0, 0]}, "major_faults": 8, "peak_resident_bytes": 68528746, "recall": null}, {"prompt": 0, "repetition": 0, "warmup": false, "tokens": [27670, 12623], "steps": {"time_s": [0.32822875588551587, 0.029721097357278865], "stall_s": [0.26394020805193597, 0.017638336555648747], "hits": [48, 9], "late": [9, 3], "misses": [15, 0], "read_bytes": [15600000, 3000000], "prefetched_bytes": [6600000, 3000000], "wasted_bytes": [600000, 0]}, "major_faults": 35, "peak_resident_bytes": 68708706, "recall": null}], "totals": {"wall_s": 21.5, "peak_resident_bytes": 69206016, "major_faults": 310, "storage_read_bytes": 900000000, "page_cache_resident_fraction": 0.01, "passage_nats": []}, "emulated": ["expert reads limited to 43 MB/s by the engine"], "started_at": "2026-11-23T22:15:14+00:00", "ended_at": "2026-11-23T22:15:20+00:00", "farm_version": "0.1.0", "engine_sha256": "e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1e1", "command": "python3 -m engine run --request request.json", "estimate": null, "log_tail": "", "extra": {}}');
CREATE TABLE sweeps (
	id VARCHAR(100) NOT NULL, 
	name VARCHAR(200) NOT NULL, 
	started_at VARCHAR(40) NOT NULL, 
	record TEXT NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "sweeps" VALUES('20261123-221500-3f2a','demo','2026-11-23T22:15:00+00:00','{"v": 1, "id": "20261123-221500-3f2a", "name": "demo", "matrix_toml": "[matrix]\n", "baseline": "naive-swap", "planned": [["pi4b-emulated/tiny-mixtral-int4/edgemoe/10-experts/dialogue/cold", 0]], "started_at": "2026-11-23T22:15:00+00:00", "farm_version": "0.1.0", "matrix_folder": ""}');
CREATE INDEX ix_sweeps_started_at ON sweeps (started_at);
CREATE INDEX ix_sweeps_name ON sweeps (name);
CREATE INDEX ix_runs_engine_sha256 ON runs (engine_sha256);
CREATE INDEX ix_runs_history ON runs (device, container, strategy, workload, started_at);
CREATE INDEX ix_runs_sweep ON runs (sweep_id, started_at);
COMMIT;
