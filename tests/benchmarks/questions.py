"""The interview collection's questions, word for word, and their English: what the guides must answer."""

from __future__ import annotations

NUMBERED = {
    "Q1": ("介绍一下你的 FoloVLLM 项目", "Introduce your FoloVLLM project"),
    "Q2": ("为什么选择这个项目？", "Why did you choose this project?"),
    "Q3": ("项目的技术难点是什么？", "What were the hard parts?"),
    "Q4": ("什么是 KV Cache？为什么需要它？", "What is a KV cache? Why is it needed?"),
    "Q5": ("PagedAttention 是如何工作的？", "How does PagedAttention work?"),
    "Q6": ("Flash Attention 为什么快？", "Why is Flash Attention fast?"),
    "Q7": ("Continuous Batching 如何实现？", "How is continuous batching implemented?"),
    "Q8": ("Chunked Prefill 解决了什么问题？", "What does chunked prefill solve?"),
    "Q9": ("前缀复用 (Prefix Caching) 的原理？", "How does prefix caching work?"),
    "Q10": ("GPTQ 量化的原理？", "How does GPTQ quantisation work?"),
    "Q11": ("如何设计一个高性能的 LLM 推理系统？", "How would you design a high-performance LLM inference system?"),
    "Q12": ("如何处理长上下文推理？", "How do you handle long contexts?"),
    "Q13": ("多卡部署如何设计？", "How would you deploy on several GPUs?"),
    "Q14": ("如何分析和优化推理性能？", "How do you analyse and optimise performance?"),
    "Q15": ("Paged KV Cache 如何减少显存碎片？", "How does a paged KV cache reduce fragmentation?"),
}
FOLLOW_UPS = {
    1: ("你的 Scheduler 调度算法是什么？", "What is your scheduling algorithm?"),
    2: ("Block size 如何选择？", "How do you choose the block size?"),
    3: ("Prefix 匹配如何高效实现？", "How is prefix matching made efficient?"),
    4: ("如何处理 OOM？", "How do you handle OOM?"),
    5: ("每个优化的性能提升是多少？", "What does each optimisation win?"),
    6: ("你的实现和 vLLM 的差异？", "How does yours differ from vLLM?"),
    7: ("如何保证正确性？", "How do you ensure correctness?"),
    8: ("如何支持新模型？", "How would you support a new model?"),
    9: ("如何支持流式输出？", "How is output streamed?"),
    10: ("如何监控和调试？", "How do you monitor and debug?"),
}
TERMS = {
    "Q5": (("虚拟内存", "virtual memory"),),
    "Q6": ("IO-aware", "SRAM", "HBM", "memory-bound", "FlashAttention-2", "FlashAttention-3", "Flash-Decoding"),
    "Q7": ("Orca", "head-of-line blocking"),
    "Q8": ("Sarathi-Serve", "ITL"),
    "Q9": ("LRU",),
    "Q10": ("act-order", "memory-bound", "compute-bound", "Marlin"),
    "Q13": ("NCCL",),
    "Q14": ("NVTX", "nsys", "memory-bound", "compute-bound"),
    "3": ("SGLang", "RadixAttention", "LRU"),
}
"""What an interviewer listens for in an answer: one word in both languages, or (Chinese, English)."""
SAID = {
    "Q6": (("包括 16 步 decode", "its 16 decode steps included"), ("先收集 block", "gather the blocks first")),
    "Q7": (("p99", "p99"), ("*升到*", "*rises*")),
    "Q8": (("排在它后面的短 prompt", "a short prompt behind it"),),
    "Q10": (("4 到 64 行并不是 compute-bound", "A GPU at 4 to 64 rows is not"),),
    "2": (("KV 头数 × head_dim", "KV heads × head_dim"), ("字节数", "the bytes of a block")),
    "6": (("temperature 0.6", "temperature 0.6"), ("不是同一组请求", "drawn alike but not the same")),
}
"""What an answer must not leave out: (Chinese, English)."""
WITHIN = {
    "the follow-up of Q4": ("KV Cache 的显存占用有多大？", "how much memory does the KV cache take?"),
    "30 seconds": ("**30秒版本。**", "**30 seconds.**"),
    "1 minute": ("**1分钟版本。**", "**1 minute.**"),
    "3 minutes": ("**3分钟版本。**", "**3 minutes.**"),
    "advice": ("## 准备建议", "## Before the interview"),
}
MENTIONED = {
    "Q12": ("StreamingLLM", "H2O", "attention sink", "RAG", "O(n·w)"),
    "Q13": ("all-reduce", "TP", "PP", "DP", "NVLink"),
    "Q14": ("TTFT", "ITL", "TPOT", "E2E", "roofline"),
}
"""What the collection names in an answer and the stages do not have: the guide says what about it."""
