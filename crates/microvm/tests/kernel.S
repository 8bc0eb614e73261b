# A PVH kernel of its own, for the tests: it shares nothing with the built-in guest. Interrupts come over
# the PICs, and in every round it checks what a move could lose: SSE and debug registers, segment state,
# its own memory, and its page tables if the command line begins with `p`.
#
# 0x300000: rounds, errors, PIT ticks, bytes echoed, where the second mapping is

.set BASE,   0x200000
.set ROUNDS, 0x300000
.set ERRORS, 0x300004
.set TICKS,  0x300008
.set ECHOED, 0x30000c
.set SECOND, 0x300010               # 0, or MAPPED
.set CLOCK,  0x300018               # u64: the TSC in the last round
.set CHAIN,  0x301000               # 64 pages, each holds the round it was written in
.set PAGE_DIRECTORY, 0x280000
.set IDT,    0x281000
.set STACK,  0x290000
.set SSE,    0x291000
.set MAPPED, 0xd0000000             # a second mapping of the first 4 MiB

.section .rodata.test_kernel, "a", @progbits
.globl test_kernel_start
.globl test_kernel_end
.p2align 4
.code32
test_kernel_start:
start:
    cli
    movl $STACK, %esp
    cmpl $0x336ec578, (%ebx)        # hvm_start_info
    jne fail
    movl $ROUNDS, %edi              # what an earlier life left
    movl $(0x41000 / 4), %ecx
    xorl %eax, %eax
    cld
    rep stosl
    movl 24(%ebx), %esi             # its command line
    movb (%esi), %bl
    call print
    movl $(newline - start + BASE), %esi
    call print

    lgdt (gdt_pointer - start + BASE)
    movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw $0x18, %ax                 # a data segment that begins at CHAIN
    movw %ax, %fs
    ljmpl $0x08, $(1f - start + BASE)

1:  movl $0x210, %eax               # OSFXSR, PSE
    movl %eax, %cr4
    cmpb $'p', %bl
    jne unpaged
    # Pages of 4 MiB: all as they are, and the first once more.
    xorl %ecx, %ecx
2:  movl %ecx, %eax
    shll $22, %eax
    orl $0x83, %eax
    movl %eax, PAGE_DIRECTORY(,%ecx,4)
    incl %ecx
    cmpl $1024, %ecx
    jb 2b
    movl $0x83, PAGE_DIRECTORY + (MAPPED >> 22) * 4
    movl $PAGE_DIRECTORY, %eax
    movl %eax, %cr3
    movl %cr0, %eax
    orl $0x80000000, %eax
    movl %eax, %cr0
    movl $MAPPED, SECOND
unpaged:

    movl $0x12345678, %eax
    movl %eax, %dr0
    movups (sse - start + BASE), %xmm5

    # IDT: IRQ 0 and 4 of the PICs at 0x20 and 0x24.
    movl $(on_tick - start + BASE), %eax
    movl $0x20, %ecx
    call set_gate
    movl $(on_serial - start + BASE), %eax
    movl $0x24, %ecx
    call set_gate
    lidt (idt_pointer - start + BASE)
    movb $0x11, %al
    outb %al, $0x20
    outb %al, $0xa0
    movb $0x20, %al
    outb %al, $0x21
    movb $0x28, %al
    outb %al, $0xa1
    movb $4, %al
    outb %al, $0x21
    movb $2, %al
    outb %al, $0xa1
    movb $1, %al
    outb %al, $0x21
    outb %al, $0xa1
    movb $0xee, %al                 # IRQ 0 and 4
    outb %al, $0x21
    movb $0xff, %al
    outb %al, $0xa1
    movb $0x36, %al                 # PIT: square wave, 500 Hz
    outb %al, $0x43
    movb $0x52, %al
    outb %al, $0x40
    movb $0x09, %al
    outb %al, $0x40
    movw $0x3fc, %dx                # serial: OUT2, receive interrupt
    movb $8, %al
    outb %al, %dx
    movw $0x3f9, %dx
    movb $1, %al
    outb %al, %dx
    sti

# ebp: the round.
    xorl %ebp, %ebp
round:
    xorl %ecx, %ecx
1:  movl %ecx, %edi
    shll $12, %edi
    cmpl %ebp, %fs:(%edi)           # the last round's mark, in the segment
    jne bad
    movl SECOND, %eax
    movl CHAIN(%eax,%edi), %eax     # and in the other mapping
    cmpl %ebp, %eax
    jne bad
2:  leal 1(%ebp), %eax
    movl %eax, CHAIN(%edi)
    incl %ecx
    cmpl $64, %ecx
    jb 1b
    incl %ebp
    movl %dr0, %eax
    cmpl $0x12345678, %eax
    jne bad_registers
    movups %xmm5, SSE
    movl SSE + 8, %eax
    cmpl sse - start + BASE + 8, %eax
    jne bad_registers
3:  rdtsc
    movl %eax, CLOCK
    movl %edx, CLOCK + 4
    movl %ebp, ROUNDS
    hlt
    jmp round
bad:
    incl ERRORS
    jmp 2b
bad_registers:
    incl ERRORS
    jmp 3b

on_tick:
    pushl %eax
    incl TICKS
    movb $0x20, %al
    outb %al, $0x20
    popl %eax
    jmp back
on_serial:
    pushl %eax
    pushl %edx
1:  movw $0x3fd, %dx
    inb %dx, %al
    testb $1, %al
    jz 2f
    movw $0x3f8, %dx
    inb %dx, %al
    cmpb $'R', %al
    je reset
    incb %al
    outb %al, %dx
    incl ECHOED
    jmp 1b
2:  movb $0x20, %al
    outb %al, $0x20
    popl %edx
    popl %eax
back:                               # IRET, which KVM's emulator does not know here
    pushl 8(%esp)
    andl $~0x200, (%esp)
    popfl
    sti
    lret $4

set_gate:
    movw %ax, IDT(,%ecx,8)
    movw $0x08, IDT+2(,%ecx,8)
    movw $0x8e00, IDT+4(,%ecx,8)
    shrl $16, %eax
    movw %ax, IDT+6(,%ecx,8)
    ret

print:
    movw $0x3f8, %dx
1:  lodsb
    testb %al, %al
    jz 2f
    outb %al, %dx
    jmp 1b
2:  ret

reset:
    movb $6, %al
    movw $0xcf9, %dx
    outb %al, %dx
fail:
    hlt
    jmp fail

.p2align 3
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff
    .quad 0x00cf93000000ffff
    .quad 0x00c093301000003f        # data at 0x301000, 64 pages
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt - start + BASE
idt_pointer:
    .word 256 * 8 - 1
    .long IDT
.p2align 4
sse:
    .long 0x11111111, 0x22222222, 0x33333333, 0x44444444
newline:
    .asciz "\n"
test_kernel_end:
.code64
.text
